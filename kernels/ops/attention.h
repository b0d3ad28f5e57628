#pragma once
// Rotary positions and causal attention over packed sequences. fp32 or bf16; softmax in fp32; the score matrix
// never exists whole (blocked, online softmax). Grouped queries: query head h reads key/value head
// h / (heads / kv_heads).
//
// qkv_TH holds, per token, [heads | kv_heads | kv_heads] times head_dim: H = (heads + 2 kv_heads) head_dim.
// T is a multiple of seq_len: sequences stand one behind the other and never see each other.
//
// Token i sees tokens j <= i of its sequence; with a window W only those with i - W < j, itself and W - 1 before it.

#include <span>

#include "kernels/core/exec.h"

namespace upmoe {
struct AttentionShape {
  std::int64_t heads = 0, kv_heads = 0, head_dim = 0, seq_len = 0;
  std::int64_t window = 0;  // W; 0 = all before it
  // Where documents are masked, each has its tokens of a sequence side by side, and the host knows where: the first
  // token of each such run, rising, and T. Else empty. On the host, until the op has returned.
  std::span<const std::int32_t> runs = {};
  std::int64_t qkv_width() const { return (heads + 2 * kv_heads) * head_dim; }
  std::int64_t kv_width() const { return 2 * kv_heads * head_dim; }
};

// What queries of one chunk of the sequences see of the keys of another.
enum class Visible : std::uint8_t { kCausal, kAll };  // the same chunk; an earlier one

// Queries of one chunk of every sequence and keys of one chunk. shape.seq_len: the chunks' length. The documents of
// both chunks, or neither.
struct ChunkPair {
  AttentionShape shape;
  Visible visible = Visible::kCausal;
  ConstTensorView document_T = {}, key_document_T = {};  // int32; may be absent
  // Of an earlier chunk: the tokens from its first key to the first query; for the window.
  std::int64_t ahead = 0;
};

// What attention gave, for its backward: out_TQ (Q = heads*head_dim) and lse_TN (fp32, [T, heads]: log-sum-exp of the
// scaled scores).
struct Attended {
  ConstTensorView out_TQ, lse_TN;
};
struct ChunkPairGradients {
  TensorView dq_TQ, dkv_TK;  // fp32
};
}  // namespace upmoe

namespace upmoe::ops {

// Rotates the query and key parts of qkv_TH in place, half-split layout (pairs i, i + head_dim/2), angle
// position * theta^(-2i/head_dim) in fp32, cos and sin rounded to the dtype first, as transformers does.
// inverse = true applies the transpose: the backward. positions_T: int32.
void rope(Exec& ex, TensorView qkv_TH, ConstTensorView positions_T, AttentionShape shape, double theta,
          bool inverse);
// The inverse, and db_H (+)= the sum of all rows that it leaves, as stored: the gradient of a bias that was added
// before the rotation. To the bit what rope and then bias_backward give, in one pass.
void rope_backward(Exec& ex, TensorView dqkv_TH, GradientView db_H, ConstTensorView positions_T,
                   AttentionShape shape, double theta);

// Of bf16, probabilities and the gradients of scores may be rounded to bf16 for the products that they are factors of
// (cuDNN does, and a CPU that multiplies pairs of bf16); all sums are fp32.

// Writes out_TQ and lse_TN, as `Attended` says. document_T: int32 ids, equal = same document; a token sees earlier
// tokens of its own document only. May be absent.
void attention_forward(Exec& ex, TensorView out_TQ, TensorView lse_TN, ConstTensorView qkv_TH,
                       AttentionShape shape, ConstTensorView document_T = {});

// Writes dqkv_TH (all of it) from dout_TQ and the saved tensors of the forward.
void attention_backward(Exec& ex, TensorView dqkv_TH, ConstTensorView dout_TQ, ConstTensorView qkv_TH,
                        const Attended& saved, AttentionShape shape, ConstTensorView document_T = {});

// Context parallelism: queries of one chunk of every sequence against keys and values of one chunk, a part of
// the softmax. qkv_TH holds the queries' chunk (its keys are not looked at), kv_TK, K = kv_width(), the keys and
// values. out_TQ is fp32; a token that sees no key gets 0, and -inf in lse_TN.
void attention_pair_forward(Exec& ex, TensorView out_TQ, TensorView lse_TN, ConstTensorView qkv_TH,
                            ConstTensorView kv_TK, const ChunkPair& pair);
// Joins another part into out_TQ and lse_TN; all fp32.
void attention_merge(Exec& ex, TensorView out_TQ, TensorView lse_TN, ConstTensorView part_TQ,
                     ConstTensorView part_lse_TN);
// g += the gradients of one pair of chunks; `whole` is that of the whole softmax.
void attention_pair_backward(Exec& ex, const ChunkPairGradients& g, ConstTensorView dout_TQ,
                             ConstTensorView qkv_TH, ConstTensorView kv_TK, const Attended& whole,
                             const ChunkPair& pair);

}  // namespace upmoe::ops
