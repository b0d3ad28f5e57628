#include "kernels/ops/attention.h"

#include <algorithm>

#include "kernels/ops/check_tensor.h"
#include "kernels/ops/dispatch.h"

namespace upmoe::ops {

namespace {

void check_qkv(const Exec& ex, const ConstTensorView& qkv_TH, const AttentionShape& s,
               std::source_location where = std::source_location::current()) {
  check_float(qkv_TH, "qkv_TH", where);
  const bool sizes = s.heads > 0 && s.kv_heads > 0 && s.head_dim > 0 && s.seq_len > 0 && s.window >= 0;
  if (!sizes || s.heads % s.kv_heads != 0 || s.head_dim % 2 != 0)
    fail_check("kv_heads divides heads and head_dim is even", where,
               fmt::format("heads {}, kv_heads {}, head_dim {}, seq_len {}, window {}", s.heads, s.kv_heads,
                           s.head_dim, s.seq_len, s.window));
  if (qkv_TH.shape.rank != 2 || qkv_TH.shape[0] % s.seq_len != 0)
    fail_check("T is a multiple of seq_len", where,
               fmt::format("qkv_TH {}, seq_len {}", qkv_TH.shape.str(), s.seq_len));
  check_tensor(ex, qkv_TH, {qkv_TH.shape[0], s.qkv_width()}, qkv_TH.dtype, "qkv_TH", where);
}

// Every run has a token and lies in one sequence.
void check_runs(const AttentionShape& s, const ConstTensorView& document_T, std::int64_t tokens,
                std::source_location where) {
  if (s.runs.empty()) return;
  if (!document_T.given() || s.runs.front() != 0 || s.runs.back() != tokens)
    fail_check("runs of documents, from 0 to T", where,
               fmt::format("{} to {}, {} tokens", s.runs.front(), s.runs.back(), tokens));
  for (std::size_t i = 0; i + 1 < s.runs.size(); ++i)
    if (s.runs[i] >= s.runs[i + 1] || s.runs[i] / s.seq_len != (s.runs[i + 1] - 1) / s.seq_len)
      fail_check("a run lies in one sequence", where, fmt::format("{} to {}", s.runs[i], s.runs[i + 1]));
}

void check_attention(const Exec& ex, const ConstTensorView& qkv_TH, const ConstTensorView& out_TQ,
                     const ConstTensorView& lse_TN, const AttentionShape& s,
                     const ConstTensorView& document_T,
                     std::source_location where = std::source_location::current()) {
  check_qkv(ex, qkv_TH, s, where);
  check_scratch(ex, where);
  const std::int64_t tokens = qkv_TH.shape[0];
  check_tensor(ex, out_TQ, {tokens, s.heads * s.head_dim}, qkv_TH.dtype, "out_TQ", where);
  check_tensor(ex, lse_TN, {tokens, s.heads}, DType::kF32, "lse_TN", where);
  if (document_T.given()) check_tensor(ex, document_T, {tokens}, DType::kI32, "document_T", where);
  check_runs(s, document_T, tokens, where);
}

// One product with head_dim of `pairs_per_token` pairs of tokens, over all sequences and heads. Documents are
// known only when the op runs and are not counted.
double product_flops(const ConstTensorView& qkv_TH, const AttentionShape& s, double pairs_per_token) {
  return 2.0 * static_cast<double>(qkv_TH.shape[0]) * pairs_per_token *
         static_cast<double>(s.heads * s.head_dim);
}

// The causal half of [S, S]. Of S > W tokens the first W see 1 to W, the others W each.
double causal_pairs(const AttentionShape& s) {
  const double S = static_cast<double>(s.seq_len), W = static_cast<double>(s.window);
  if (s.window == 0 || s.window >= s.seq_len) return 0.5 * static_cast<double>(s.seq_len + 1);
  return (0.5 * W * (W + 1) + (S - W) * W) / S;
}
double causal_product_flops(const ConstTensorView& qkv_TH, const AttentionShape& s) {
  return product_flops(qkv_TH, s, causal_pairs(s));
}

// Query i sees the keys k > i + ahead - W of an earlier chunk.
double earlier_pairs(const ChunkPair& pair) {
  const std::int64_t S = pair.shape.seq_len;
  if (pair.shape.window == 0) return static_cast<double>(S);
  double pairs = 0;
  for (std::int64_t i = 0; i < S; ++i)
    pairs +=
        static_cast<double>(std::clamp<std::int64_t>(S - (i + pair.ahead - pair.shape.window + 1), 0, S));
  return pairs / static_cast<double>(S);
}

// The same for a pair of chunks.
double pair_product_flops(const ConstTensorView& qkv_TH, const ChunkPair& pair) {
  if (pair.visible == Visible::kCausal) return causal_product_flops(qkv_TH, pair.shape);
  return product_flops(qkv_TH, pair.shape, earlier_pairs(pair));
}

void check_pair(const Exec& ex, const ConstTensorView& qkv_TH, const ConstTensorView& kv_TK,
                const ChunkPair& pair, std::source_location where = std::source_location::current()) {
  check_qkv(ex, qkv_TH, pair.shape, where);
  check_scratch(ex, where);
  const std::int64_t tokens = qkv_TH.shape[0];
  check_tensor(ex, kv_TK, {tokens, pair.shape.kv_width()}, qkv_TH.dtype, "kv_TK", where);
  if (pair.visible == Visible::kAll && pair.shape.window > 0 && pair.ahead < pair.shape.seq_len)
    fail_check("an earlier chunk ends before the queries begin", where,
               fmt::format("{} tokens ahead, chunks of {}", pair.ahead, pair.shape.seq_len));
  if (pair.document_T.given() != pair.key_document_T.given())
    fail_check("documents of both chunks or of neither", where, "one is missing");
  if (!pair.document_T.given()) return;
  check_tensor(ex, pair.document_T, {tokens}, DType::kI32, "document_T", where);
  check_tensor(ex, pair.key_document_T, {tokens}, DType::kI32, "key_document_T", where);
}

void check_rope(const Exec& ex, const TensorView& qkv_TH, const ConstTensorView& positions_T,
                const AttentionShape& shape, double theta,
                std::source_location where = std::source_location::current()) {
  check_qkv(ex, qkv_TH, shape, where);
  check_scratch(ex, where);
  check_tensor(ex, positions_T, {qkv_TH.shape[0]}, DType::kI32, "positions_T", where);
  if (!(theta > 0)) fail_check("theta > 0", where, fmt::format("theta {}", theta));
}
double rotated_elements(const TensorView& qkv_TH, const AttentionShape& shape) {
  return static_cast<double>(qkv_TH.shape[0] * (shape.heads + shape.kv_heads) * shape.head_dim);
}

}  // namespace

void rope(Exec& ex, TensorView qkv_TH, ConstTensorView positions_T, AttentionShape shape, double theta,
          bool inverse) {
  check_rope(ex, qkv_TH, positions_T, shape, theta);
  const double rotated = rotated_elements(qkv_TH, shape);
  const double bytes = rotated * static_cast<double>(size_of(qkv_TH.dtype));
  ex.book("rope", 3.0 * rotated, bytes + bytes_of(positions_T), bytes);
  dispatch(ex, &Backend::rope, qkv_TH, positions_T, shape, theta, inverse);
}

void rope_backward(Exec& ex, TensorView dqkv_TH, GradientView db_H, ConstTensorView positions_T,
                   AttentionShape shape, double theta) {
  check_rope(ex, dqkv_TH, positions_T, shape, theta);
  check_float_or(db_H, dqkv_TH.dtype, "db_H");
  check_tensor(ex, db_H, {dqkv_TH.shape[1]}, db_H.dtype, "db_H");
  const double rotated = rotated_elements(dqkv_TH, shape);
  ex.book("rope_backward", 3.0 * rotated + static_cast<double>(dqkv_TH.elements()),
          bytes_of(dqkv_TH) + bytes_of(positions_T) + bytes_if_added(db_H),
          rotated * static_cast<double>(size_of(dqkv_TH.dtype)) + bytes_of(db_H));
  dispatch(ex, &Backend::rope_backward, dqkv_TH, db_H, positions_T, shape, theta);
}

void attention_forward(Exec& ex, TensorView out_TQ, TensorView lse_TN, ConstTensorView qkv_TH,
                       AttentionShape shape, ConstTensorView document_T) {
  check_attention(ex, qkv_TH, out_TQ, lse_TN, shape, document_T);
  ex.book("attention_forward", 2.0 * causal_product_flops(qkv_TH, shape), bytes_of(qkv_TH),
          bytes_of(out_TQ) + bytes_of(lse_TN), Work::kAttention);
  dispatch(ex, &Backend::attention_forward, out_TQ, lse_TN, qkv_TH, shape, document_T);
}

void attention_backward(Exec& ex, TensorView dqkv_TH, ConstTensorView dout_TQ, ConstTensorView qkv_TH,
                        const Attended& saved, AttentionShape shape, ConstTensorView document_T) {
  const auto& [out_TQ, lse_TN] = saved;
  check_attention(ex, qkv_TH, out_TQ, lse_TN, shape, document_T);
  check_tensor(ex, dout_TQ, out_TQ.shape, qkv_TH.dtype, "dout_TQ");
  check_tensor(ex, dqkv_TH, qkv_TH.shape, qkv_TH.dtype, "dqkv_TH");
  // Four products are the gradients of the forward's two; the fifth, which recomputes the scores, is overhead
  // of this algorithm and no model FLOP.
  ex.book("attention_backward", 4.0 * causal_product_flops(qkv_TH, shape),
          bytes_of(qkv_TH) + 2 * bytes_of(out_TQ) + bytes_of(lse_TN), bytes_of(dqkv_TH),
          Work::kAttentionBackward);
  dispatch(ex, &Backend::attention_backward, dqkv_TH, dout_TQ, qkv_TH, saved, shape, document_T);
}

void attention_pair_forward(Exec& ex, TensorView out_TQ, TensorView lse_TN, ConstTensorView qkv_TH,
                            ConstTensorView kv_TK, const ChunkPair& pair) {
  check_pair(ex, qkv_TH, kv_TK, pair);
  const AttentionShape& shape = pair.shape;
  const std::int64_t tokens = qkv_TH.shape[0];
  check_tensor(ex, out_TQ, {tokens, shape.heads * shape.head_dim}, DType::kF32, "out_TQ");
  check_tensor(ex, lse_TN, {tokens, shape.heads}, DType::kF32, "lse_TN");
  ex.book("attention_pair_forward", 2.0 * pair_product_flops(qkv_TH, pair),
          bytes_of(out_TQ) * static_cast<double>(size_of(qkv_TH.dtype)) / 4 + bytes_of(kv_TK),
          bytes_of(out_TQ) + bytes_of(lse_TN), Work::kAttention);
  dispatch(ex, &Backend::attention_pair_forward, out_TQ, lse_TN, qkv_TH, kv_TK, pair);
}

void attention_merge(Exec& ex, TensorView out_TQ, TensorView lse_TN, ConstTensorView part_TQ,
                     ConstTensorView part_lse_TN) {
  UPMOE_CHECK(out_TQ.shape.rank == 2 && lse_TN.shape.rank == 2 && lse_TN.shape[1] > 0 &&
                  out_TQ.shape[1] % lse_TN.shape[1] == 0,
              "out_TQ {}, lse_TN {}", out_TQ.shape.str(), lse_TN.shape.str());
  check_tensor(ex, out_TQ, {lse_TN.shape[0], out_TQ.shape[1]}, DType::kF32, "out_TQ");
  check_tensor(ex, lse_TN, lse_TN.shape, DType::kF32, "lse_TN");
  check_tensor(ex, part_TQ, out_TQ.shape, DType::kF32, "part_TQ");
  check_tensor(ex, part_lse_TN, lse_TN.shape, DType::kF32, "part_lse_TN");
  ex.book("attention_merge", 0, 2 * bytes_of(out_TQ) + 2 * bytes_of(lse_TN),
          bytes_of(out_TQ) + bytes_of(lse_TN));
  dispatch(ex, &Backend::attention_merge, out_TQ, lse_TN, part_TQ, part_lse_TN);
}

void attention_pair_backward(Exec& ex, const ChunkPairGradients& g, ConstTensorView dout_TQ,
                             ConstTensorView qkv_TH, ConstTensorView kv_TK, const Attended& whole,
                             const ChunkPair& pair) {
  check_pair(ex, qkv_TH, kv_TK, pair);
  const AttentionShape& shape = pair.shape;
  const auto& [dq_TQ, dkv_TK] = g;
  const auto& [out_TQ, lse_TN] = whole;
  const std::int64_t tokens = qkv_TH.shape[0];
  check_tensor(ex, out_TQ, {tokens, shape.heads * shape.head_dim}, qkv_TH.dtype, "out_TQ");
  check_tensor(ex, dout_TQ, out_TQ.shape, qkv_TH.dtype, "dout_TQ");
  check_tensor(ex, lse_TN, {tokens, shape.heads}, DType::kF32, "lse_TN");
  check_tensor(ex, dq_TQ, out_TQ.shape, DType::kF32, "dq_TQ");
  check_tensor(ex, dkv_TK, kv_TK.shape, DType::kF32, "dkv_TK");
  ex.book("attention_pair_backward", 4.0 * pair_product_flops(qkv_TH, pair),
          3 * bytes_of(out_TQ) + bytes_of(kv_TK) + bytes_of(lse_TN) + bytes_of(dq_TQ) + bytes_of(dkv_TK),
          bytes_of(dq_TQ) + bytes_of(dkv_TK), Work::kAttentionBackward);
  dispatch(ex, &Backend::attention_pair_backward, g, dout_TQ, qkv_TH, kv_TK, whole, pair);
}

}  // namespace upmoe::ops
