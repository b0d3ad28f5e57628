#include "kernels/cuda/portable/attention.h"

#include <algorithm>
#include <cmath>

#include "kernels/cuda/portable/attention_tiles.cuh"
#include "kernels/ops/backend.h"

namespace upmoe::cuda {

namespace {

// A distance between tokens as the kernels hold it: beyond every chunk's length all are alike.
int distance(std::int64_t tokens) {
  return static_cast<int>(std::min<std::int64_t>(tokens, 1 << 30));
}

// `key` is the first key of the first key/value head; its values lie kv_heads heads behind it.
template <class T>
AttentionInputs<T> inputs(const T* query, const T* key, std::int64_t key_stride, const ChunkPair& pair) {
  const AttentionShape& shape = pair.shape;
  return {.q = query,
          .k = key,
          .v = key + shape.kv_heads * shape.head_dim,
          .q_stride = shape.qkv_width(),
          .kv_stride = key_stride,
          .query_document = pair.document_T.if_given<std::int32_t>(),
          .key_document = pair.key_document_T.if_given<std::int32_t>(),
          .seq_len = static_cast<int>(shape.seq_len),
          .heads = static_cast<int>(shape.heads),
          .kv_heads = static_cast<int>(shape.kv_heads),
          .head_dim = static_cast<int>(shape.head_dim),
          .causal = pair.visible == Visible::kCausal,
          .ahead = pair.visible == Visible::kCausal ? 0 : distance(pair.ahead),
          .window = distance(shape.window),
          .scale = 1.0f / std::sqrt(static_cast<float>(shape.head_dim))};
}

template <class T>
AttentionInputs<T> self_inputs(const ConstTensorView& qkv_TH, const AttentionShape& shape,
                               const ConstTensorView& document_T) {
  const T* qkv = qkv_TH.as<T>();
  return inputs<T>(qkv, qkv + shape.heads * shape.head_dim, shape.qkv_width(),
                   {shape, Visible::kCausal, document_T, document_T});
}

template <class T>
AttentionInputs<T> pair_inputs(const ConstTensorView& qkv_TH, const ConstTensorView& kv_TK,
                               const ChunkPair& pair) {
  return inputs<T>(qkv_TH.as<T>(), kv_TK.as<T>(), pair.shape.kv_width(), pair);
}

// One warp, one row of a head; out and lse are of two parts of one softmax, then of both.
__global__ void merge_rows(float* out, float* lse, const float* part, const float* part_lse,
                           std::int64_t rows, std::int64_t width) {
  const std::int64_t row = global_thread() / kWarp;
  if (row >= rows) return;
  // A part's output is its own softmax's mean of values; its share of the whole is exp(its lse - the joint lse).
  const float mine_lse = lse[row], theirs_lse = part_lse[row], largest = fmaxf(mine_lse, theirs_lse);
  __syncwarp();                      // all lanes have read before one writes
  if (largest == -INFINITY) return;  // neither has seen a key
  const float mine = expf(mine_lse - largest), theirs = expf(theirs_lse - largest), sum = mine + theirs;
  for (std::int64_t d = threadIdx.x % kWarp; d < width; d += kWarp)
    out[row * width + d] = out[row * width + d] * (mine / sum) + part[row * width + d] * (theirs / sum);
  if (threadIdx.x % kWarp == 0) lse[row] = largest + logf(sum);
}

// Token by token from head by head, or the other way.
template <bool kToTokens>
__global__ void reorder_lse(float* out, const float* in, std::int64_t n, std::int64_t heads,
                            std::int64_t seq_len) {
  const std::int64_t i = global_thread();
  if (i >= n) return;
  const std::int64_t token = i / heads, head = i % heads;
  const std::int64_t by_head = (token / seq_len * heads + head) * seq_len + token % seq_len;
  if (kToTokens) {
    out[i] = in[by_head];
  } else {
    out[by_head] = in[i];
  }
}

struct Runs {
  const std::int32_t *begin, *size;
  std::int64_t first_head, all_heads;
};
// stats is [documents, heads, seq_len].
template <bool kToTokens>
__global__ void reorder_runs(float* out, const float* in, std::int64_t n, std::int64_t heads,
                             std::int64_t seq_len, Runs runs) {
  const std::int64_t i = global_thread();
  if (i >= n) return;
  const std::int64_t place = i % seq_len, head = i / seq_len % heads, document = i / seq_len / heads;
  if (place >= runs.size[document]) return;
  const std::int64_t by_token = (runs.begin[document] + place) * runs.all_heads + runs.first_head + head;
  if (kToTokens) {
    out[by_token] = in[i];
  } else {
    out[i] = in[by_token];
  }
}

template <bool kToTokens>
void reorder(const Exec& ex, const TensorView& out, const ConstTensorView& in,
             const portable::TokenRuns& runs) {
  const ConstTensorView stats_BHS = kToTokens ? in : ConstTensorView(out),
                        lse_TN = kToTokens ? ConstTensorView(out) : in;
  const Runs on_device{runs.begin_b.as<std::int32_t>(), runs.size_b.as<std::int32_t>(), runs.first_head,
                       lse_TN.shape[1]};
  launch(ex, blocks_for(stats_BHS.elements(), kThreads), kThreads, reorder_runs<kToTokens>, out.as<float>(),
         in.as<float>(), stats_BHS.elements(), stats_BHS.shape[1], stats_BHS.shape[2], on_device);
}

template <bool kToTokens>
void reorder(const Exec& ex, const TensorView& out, const ConstTensorView& in, const AttentionShape& shape) {
  launch(ex, blocks_for(in.elements(), kThreads), kThreads, reorder_lse<kToTokens>, out.as<float>(),
         in.as<float>(), in.elements(), shape.heads, shape.seq_len);
}

}  // namespace

namespace portable {

void attention_forward(Exec& ex, TensorView out_TQ, TensorView lse_TN, ConstTensorView qkv_TH,
                       const AttentionShape& shape, const ConstTensorView& document_T) {
  with_float_type(qkv_TH.dtype, [&](auto type) {
    using T = decltype(type);
    attend(ex, out_TQ.as<T>(), lse_TN.as<float>(), self_inputs<T>(qkv_TH, shape, document_T),
           qkv_TH.shape[0]);
  });
}

void attention_backward(Exec& ex, TensorView dqkv_TH, ConstTensorView dout_TQ, ConstTensorView qkv_TH,
                        const Attended& saved, const AttentionShape& shape,
                        const ConstTensorView& document_T) {
  with_float_type(qkv_TH.dtype, [&](auto type) {
    using T = decltype(type);
    T* dq = dqkv_TH.as<T>();
    T* dk = dq + shape.heads * shape.head_dim;
    const AttentionGradients<T, T> gradients{dq, dk, dk + shape.kv_heads * shape.head_dim, shape.qkv_width(),
                                             shape.qkv_width()};
    attend_backward<false>(ex, gradients, dout_TQ.as<T>(), saved.out_TQ.as<T>(), saved.lse_TN.as<float>(),
                           self_inputs<T>(qkv_TH, shape, document_T), qkv_TH.shape[0]);
  });
}

void attention_pair_forward(Exec& ex, TensorView out_TQ, TensorView lse_TN, ConstTensorView qkv_TH,
                            ConstTensorView kv_TK, const ChunkPair& pair) {
  with_float_type(qkv_TH.dtype, [&](auto type) {
    using T = decltype(type);
    attend(ex, out_TQ.as<float>(), lse_TN.as<float>(), pair_inputs<T>(qkv_TH, kv_TK, pair), qkv_TH.shape[0]);
  });
}

void attention_pair_backward(Exec& ex, const ChunkPairGradients& g, ConstTensorView dout_TQ,
                             ConstTensorView qkv_TH, ConstTensorView kv_TK, const Attended& whole,
                             const ChunkPair& pair) {
  const AttentionShape& shape = pair.shape;
  with_float_type(qkv_TH.dtype, [&](auto type) {
    using T = decltype(type);
    float* dk = g.dkv_TK.as<float>();
    const AttentionGradients<T, float> gradients{g.dq_TQ.as<float>(), dk,
                                                 dk + shape.kv_heads * shape.head_dim,
                                                 shape.heads * shape.head_dim, shape.kv_width()};
    attend_backward<true>(ex, gradients, dout_TQ.as<T>(), whole.out_TQ.as<T>(), whole.lse_TN.as<float>(),
                          pair_inputs<T>(qkv_TH, kv_TK, pair), qkv_TH.shape[0]);
  });
}

void order_by_token(Exec& ex, TensorView lse_TN, ConstTensorView stats_BHS, const AttentionShape& shape) {
  reorder<true>(ex, lse_TN, stats_BHS, shape);
}

void order_by_head(Exec& ex, TensorView stats_BHS, ConstTensorView lse_TN, const AttentionShape& shape) {
  reorder<false>(ex, stats_BHS, lse_TN, shape);
}

void order_by_token(Exec& ex, TensorView lse_TN, ConstTensorView stats_BHS, const TokenRuns& runs) {
  reorder<true>(ex, lse_TN, stats_BHS, runs);
}

void order_by_head(Exec& ex, TensorView stats_BHS, ConstTensorView lse_TN, const TokenRuns& runs) {
  reorder<false>(ex, stats_BHS, lse_TN, runs);
}

}  // namespace portable

void attention_merge(Exec& ex, TensorView out_TQ, TensorView lse_TN, ConstTensorView part_TQ,
                     ConstTensorView part_lse_TN) {
  const std::int64_t rows = lse_TN.elements();
  if (rows == 0) return;
  launch(ex, blocks_for(rows, kThreads / kWarp), kThreads, merge_rows, out_TQ.as<float>(), lse_TN.as<float>(),
         part_TQ.as<float>(), part_lse_TN.as<float>(), rows, out_TQ.shape[1] / lse_TN.shape[1]);
}

}  // namespace upmoe::cuda
