#pragma once
// Attention by kernels that every GPU runs: any float dtype, documents, pairs of chunks, heads of up to 256. Slow
// in bf16. Contracts stand in kernels/ops/attention.h.

#include "kernels/ops/attention.h"

namespace upmoe::cuda::portable {

void attention_forward(Exec& ex, TensorView out_TQ, TensorView lse_TN, ConstTensorView qkv_TH,
                       const AttentionShape& shape, const ConstTensorView& document_T);
void attention_backward(Exec& ex, TensorView dqkv_TH, ConstTensorView dout_TQ, ConstTensorView qkv_TH,
                        const Attended& saved, const AttentionShape& shape,
                        const ConstTensorView& document_T);
void attention_pair_forward(Exec& ex, TensorView out_TQ, TensorView lse_TN, ConstTensorView qkv_TH,
                            ConstTensorView kv_TK, const ChunkPair& pair);
void attention_pair_backward(Exec& ex, const ChunkPairGradients& g, ConstTensorView dout_TQ,
                             ConstTensorView qkv_TH, ConstTensorView kv_TK, const Attended& whole,
                             const ChunkPair& pair);

// cuDNN keeps the rows' log-sum-exp by head, the layers by token: one from the other.
void order_by_token(Exec& ex, TensorView lse_TN, ConstTensorView stats_BHS, const AttentionShape& shape);
void order_by_head(Exec& ex, TensorView stats_BHS, ConstTensorView lse_TN, const AttentionShape& shape);
// The same for documents, and some of the heads, from first_head on: document b has size_b[b] tokens from begin_b[b] on
// (int32). Tokens of none stay as they are.
struct TokenRuns {
  ConstTensorView begin_b, size_b;
  std::int64_t first_head = 0;
};
void order_by_token(Exec& ex, TensorView lse_TN, ConstTensorView stats_BHS, const TokenRuns& runs);
void order_by_head(Exec& ex, TensorView stats_BHS, ConstTensorView lse_TN, const TokenRuns& runs);

}  // namespace upmoe::cuda::portable
