#include "kernels/ops/attention.h"

#include <atomic>
#include <cmath>

#include "kernels/core/log.h"
#include "kernels/cuda/library/cudnn_sdpa.h"
#include "kernels/cuda/portable/attention_tiles.cuh"
#include "kernels/ops/backend.h"

namespace upmoe::cuda {

namespace {

const std::int32_t* ids(const ConstTensorView* document_T) {
  return document_T != nullptr ? document_T->as<std::int32_t>() : nullptr;
}

// `key` is the first key of the first key/value head; its values lie kv_heads heads behind it.
template <class T>
AttentionInputs<T> inputs(const T* query, const T* key, std::int64_t key_stride, const AttentionShape& shape,
                          Visible visible, const ConstTensorView* document_T,
                          const ConstTensorView* key_document_T) {
  AttentionInputs<T> in{};
  in.q = query;
  in.k = key;
  in.v = key + shape.kv_heads * shape.head_dim;
  in.q_stride = shape.qkv_width();
  in.kv_stride = key_stride;
  in.query_document = ids(document_T);
  in.key_document = ids(key_document_T);
  in.seq_len = static_cast<int>(shape.seq_len);
  in.heads = static_cast<int>(shape.heads);
  in.kv_heads = static_cast<int>(shape.kv_heads);
  in.head_dim = static_cast<int>(shape.head_dim);
  in.causal = visible == Visible::kCausal;
  in.scale = 1.0f / std::sqrt(static_cast<float>(shape.head_dim));
  return in;
}

template <class T>
AttentionInputs<T> self_inputs(const ConstTensorView& qkv_TH, const AttentionShape& shape,
                               const ConstTensorView* document_T) {
  const T* qkv = qkv_TH.as<T>();
  return inputs<T>(qkv, qkv + shape.heads * shape.head_dim, shape.qkv_width(), shape, Visible::kCausal,
                   document_T, document_T);
}

template <class T>
AttentionInputs<T> pair_inputs(const ConstTensorView& qkv_TH, const ConstTensorView& kv_TK,
                               const AttentionShape& shape, Visible visible,
                               const ConstTensorView* document_T, const ConstTensorView* key_document_T) {
  return inputs<T>(qkv_TH.as<T>(), kv_TK.as<T>(), shape.kv_width(), shape, visible, document_T,
                   key_document_T);
}

// One warp, one row of a head; out and lse are of two parts of one softmax, then of both.
__global__ void merge_rows(float* out, float* lse, const float* part, const float* part_lse,
                           std::int64_t rows, std::int64_t width) {
  const std::int64_t row = global_thread() / kWarp;
  if (row >= rows) return;
  const float mine_lse = lse[row], theirs_lse = part_lse[row], largest = fmaxf(mine_lse, theirs_lse);
  __syncwarp();                      // all lanes have read before one writes
  if (largest == -INFINITY) return;  // neither has seen a key
  const float mine = expf(mine_lse - largest), theirs = expf(theirs_lse - largest), sum = mine + theirs;
  for (std::int64_t d = threadIdx.x % kWarp; d < width; d += kWarp)
    out[row * width + d] = out[row * width + d] * (mine / sum) + part[row * width + d] * (theirs / sum);
  if (threadIdx.x % kWarp == 0) lse[row] = largest + logf(sum);
}

// cuDNN keeps the rows' log-sum-exp by head, the layers by token: one from the other.
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

template <bool kToTokens>
void reorder(Exec& ex, TensorView out, ConstTensorView in, const AttentionShape& shape) {
  launch(ex, blocks_for(in.elements(), kThreads), kThreads, reorder_lse<kToTokens>, out.as<float>(),
         in.as<float>(), in.elements(), shape.heads, shape.seq_len);
}

// In bf16 the portable kernel is the slow way; why it is taken is told once.
enum class Slow { kDocuments, kContext };
void tell(Slow why, DType dtype) {
  static std::atomic<bool> told[2];
  if (dtype != DType::kBF16 || told[static_cast<int>(why)].exchange(true)) return;
  log::warning("attention in bf16 {}: the portable kernel computes it, which is slow on GPUs",
               why == Slow::kDocuments ? "with documents masked (data.mask_documents)"
                                       : "under context parallelism (parallel.cp)");
}

TensorView take_stats(Exec& ex, const ConstTensorView& lse_TN) {
  return ex.scratch->take(lse_TN.shape, DType::kF32, "log-sum-exp by head");
}

}  // namespace

void attention_forward(Exec& ex, TensorView out_TQ, TensorView lse_TN, ConstTensorView qkv_TH,
                       AttentionShape shape, const ConstTensorView* document_T) {
  if (document_T == nullptr && sdpa_takes(ex, shape, qkv_TH.shape[0], qkv_TH.dtype)) {
    ScratchScope scope(*ex.scratch);
    const TensorView stats = take_stats(ex, lse_TN);
    sdpa_forward(ex, out_TQ, stats, qkv_TH, shape);
    return reorder<true>(ex, lse_TN, stats, shape);
  }
  if (document_T != nullptr) tell(Slow::kDocuments, qkv_TH.dtype);
  with_float_type(qkv_TH.dtype, [&](auto type) {
    using T = decltype(type);
    attend(ex, out_TQ.as<T>(), lse_TN.as<float>(), self_inputs<T>(qkv_TH, shape, document_T),
           qkv_TH.shape[0]);
  });
}

void attention_backward(Exec& ex, TensorView dqkv_TH, ConstTensorView dout_TQ, ConstTensorView qkv_TH,
                        ConstTensorView out_TQ, ConstTensorView lse_TN, AttentionShape shape,
                        const ConstTensorView* document_T) {
  if (document_T == nullptr && sdpa_takes(ex, shape, qkv_TH.shape[0], qkv_TH.dtype)) {
    ScratchScope scope(*ex.scratch);
    const TensorView stats = take_stats(ex, lse_TN);
    reorder<false>(ex, stats, lse_TN, shape);
    return sdpa_backward(ex, dqkv_TH, dout_TQ, qkv_TH, out_TQ, stats, shape);
  }
  with_float_type(qkv_TH.dtype, [&](auto type) {
    using T = decltype(type);
    T* dq = dqkv_TH.as<T>();
    T* dk = dq + shape.heads * shape.head_dim;
    const AttentionGradients<T, T> gradients{dq, dk, dk + shape.kv_heads * shape.head_dim, shape.qkv_width(),
                                             shape.qkv_width()};
    attend_backward<false>(ex, gradients, dout_TQ.as<T>(), out_TQ.as<T>(), lse_TN.as<float>(),
                           self_inputs<T>(qkv_TH, shape, document_T), qkv_TH.shape[0]);
  });
}

void attention_pair_forward(Exec& ex, TensorView out_TQ, TensorView lse_TN, ConstTensorView qkv_TH,
                            ConstTensorView kv_TK, AttentionShape shape, Visible visible,
                            const ConstTensorView* document_T, const ConstTensorView* key_document_T) {
  tell(Slow::kContext, qkv_TH.dtype);
  with_float_type(qkv_TH.dtype, [&](auto type) {
    using T = decltype(type);
    attend(ex, out_TQ.as<float>(), lse_TN.as<float>(),
           pair_inputs<T>(qkv_TH, kv_TK, shape, visible, document_T, key_document_T), qkv_TH.shape[0]);
  });
}

void attention_merge(Exec& ex, TensorView out_TQ, TensorView lse_TN, ConstTensorView part_TQ,
                     ConstTensorView part_lse_TN) {
  const std::int64_t rows = lse_TN.elements();
  if (rows == 0) return;
  launch(ex, blocks_for(rows, kThreads / kWarp), kThreads, merge_rows, out_TQ.as<float>(), lse_TN.as<float>(),
         part_TQ.as<float>(), part_lse_TN.as<float>(), rows, out_TQ.shape[1] / lse_TN.shape[1]);
}

void attention_pair_backward(Exec& ex, TensorView dq_TQ, TensorView dkv_TK, ConstTensorView dout_TQ,
                             ConstTensorView qkv_TH, ConstTensorView kv_TK, ConstTensorView out_TQ,
                             ConstTensorView lse_TN, AttentionShape shape, Visible visible,
                             const ConstTensorView* document_T, const ConstTensorView* key_document_T) {
  with_float_type(qkv_TH.dtype, [&](auto type) {
    using T = decltype(type);
    float* dk = dkv_TK.as<float>();
    const AttentionGradients<T, float> gradients{dq_TQ.as<float>(), dk, dk + shape.kv_heads * shape.head_dim,
                                                 shape.heads * shape.head_dim, shape.kv_width()};
    attend_backward<true>(ex, gradients, dout_TQ.as<T>(), out_TQ.as<T>(), lse_TN.as<float>(),
                          pair_inputs<T>(qkv_TH, kv_TK, shape, visible, document_T, key_document_T),
                          qkv_TH.shape[0]);
  });
}

}  // namespace upmoe::cuda
