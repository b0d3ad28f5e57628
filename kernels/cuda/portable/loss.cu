#include "kernels/cuda/portable/loss.h"

#include "kernels/cuda/portable/loss_rows.cuh"
#include "kernels/ops/backend.h"

namespace upmoe::cuda {

namespace {

struct RowMemory {
  float largest[kRowThreads / kWarp];
  double sum[kRowThreads / kWarp];
};

struct RowStats {
  float largest;
  double sum;  // of exp(x - largest)
};

// One pass: every thread carries the largest of its logits, kLeastLogit before there is one, and the sum relative to
// it; the threads' sums, of a few hundred terms each, are added in fp64. Rows are taken in packs of N logits.
template <int N, bool kFast>
__device__ inline RowStats row_stats(const float* x, std::int64_t n, RowMemory& memory) {
  float largest = kLeastLogit, sum = 0;
#pragma unroll 4
  for (std::int64_t i = threadIdx.x * N; i < n; i += kRowThreads * N) {
    float v[N];
    load_floats(v, x + i);
    float most = v[0];
#pragma unroll
    for (int j = 1; j < N; ++j) most = fmaxf(most, v[j]);
    if (most > largest) {
      sum *= expf(largest - most);
      largest = most;
    }
#pragma unroll
    for (int j = 0; j < N; ++j) sum += exponential<kFast>(v[j] - largest);
  }
  RowStats all{};
  all.largest = block_max(largest, memory.largest);
  // Two parts of a softmax, (largest, sum of exp(x - largest)), are joined by scaling a sum to the greater largest.
  all.sum =
      block_sum(static_cast<double>(sum) * static_cast<double>(expf(largest - all.largest)), memory.sum);
  return all;
}

// The gradient is taken from x - largest and 1 / sum, not from x - lse: for logits of 1e4 the rounding of an
// fp32 lse alone would be a relative error of 5e-4. `target` outside [0, n) is another shard's. dx may be x.
template <int N, class T>
__device__ void gradient_row(T* dx, const float* x, std::int64_t n, float largest, double sum,
                             std::int64_t target, float scale) {
  constexpr bool kFast = sizeof(T) == 2;
  const float factor = static_cast<float>(scale / sum);
  // The target's element is put right behind the loop, by the thread that writes it there.
  const bool has_target = target >= 0 && target < n && target / N % kRowThreads == threadIdx.x;
  float at_target = 0;
  if (has_target) at_target = scale * (expf(x[target] - largest) / static_cast<float>(sum) - 1.0f);
#pragma unroll 4
  for (std::int64_t i = threadIdx.x * N; i < n; i += kRowThreads * N) {
    float v[N];
    load_floats(v, x + i);
#pragma unroll
    for (int j = 0; j < N; ++j) v[j] = exponential<kFast>(v[j] - largest) * factor;
    store_floats(dx + i, v);
  }
  if (has_target) dx[target] = from_float<T>(at_target);
}

template <class T>
__device__ void ignored_row(float* loss, T* dx, std::int64_t n) {
  if (threadIdx.x == 0) *loss = 0;
  clear_row(dx, n);
}

__global__ void find_targets(const std::int32_t* targets, std::int64_t rows, std::int64_t vocab,
                             FindingWords findings) {
  const std::int64_t row = global_thread();
  if (row >= rows || is_target(targets[row], vocab)) return;
  find(findings, Finding::kTarget, row, static_cast<std::uint32_t>(targets[row]));
}

template <int N, class T>
__global__ void loss_row(float* loss, T* dlogits, const float* logits, const std::int32_t* targets,
                         std::int64_t vocab, float scale, FindingWords findings) {
  __shared__ RowMemory memory;
  const std::int64_t row = blockIdx.x;
  const float* x = logits + row * vocab;
  T* dx = dlogits != nullptr ? dlogits + row * vocab : nullptr;
  const std::int32_t target = checked_target(targets, vocab, findings);
  if (target < 0) return ignored_row(loss + row, dx, vocab);
  // The row is read twice, here and by gradient_row: a vocabulary of fp32 logits is more than a block's registers hold.
  const RowStats all = row_stats<N, sizeof(T) == 2>(x, vocab, memory);
  if (threadIdx.x == 0)
    loss[row] = static_cast<float>(log(all.sum) +
                                   (static_cast<double>(all.largest) - static_cast<double>(x[target])));
  __syncthreads();  // the gradient may be written over the target's logit
  if (dx != nullptr) gradient_row<N>(dx, x, vocab, all.largest, all.sum, target, scale);
}

template <int N>
__global__ void stats_row(double* stats, const float* logits, const std::int32_t* targets,
                          std::int64_t columns, std::int64_t begin, std::int64_t vocab,
                          FindingWords findings) {
  __shared__ RowMemory memory;
  const float* x = logits + static_cast<std::int64_t>(blockIdx.x) * columns;
  const std::int32_t target = checked_target(targets, vocab, findings);
  const RowStats all = row_stats<N, false>(x, columns, memory);
  if (threadIdx.x != 0) return;
  const std::int64_t column = target - begin;
  double* out = stats + 3 * static_cast<std::int64_t>(blockIdx.x);
  out[0] = static_cast<double>(all.largest);
  out[1] = all.sum;
  out[2] = target >= 0 && 0 <= column && column < columns ? static_cast<double>(x[column]) : 0.0;
}

template <int N, class T>
__global__ void sharded_row(float* loss, T* dlogits, const float* logits, const std::int32_t* targets,
                            const double* stats, std::int64_t shards, std::int64_t columns, float scale,
                            std::int64_t begin, std::int64_t vocab, FindingWords findings) {
  const std::int64_t row = blockIdx.x, rows = gridDim.x;
  T* dx = dlogits != nullptr ? dlogits + row * columns : nullptr;
  const std::int32_t target = checked_target(targets, vocab, findings);
  if (target < 0) return ignored_row(loss + row, dx, columns);
  // Every thread joins the shards' stats for itself, without a barrier, and every rank in the order of shards: all have
  // the same loss, to the bit.
  double largest = -INFINITY, sum = 0, at_target = 0;
  for (std::int64_t p = 0; p < shards; ++p) largest = fmax(largest, stats[3 * (p * rows + row)]);
  for (std::int64_t p = 0; p < shards; ++p) {
    const double* s = stats + 3 * (p * rows + row);
    sum += s[1] * exp(s[0] - largest);
    at_target += s[2];
  }
  if (threadIdx.x == 0) loss[row] = static_cast<float>(log(sum) + (largest - at_target));
  if (dx != nullptr)
    gradient_row<N>(dx, logits + row * columns, columns, static_cast<float>(largest), sum, target - begin,
                    scale);
}

}  // namespace

namespace portable {

void check_targets(Exec& ex, ConstTensorView targets_C, std::int64_t vocab) {
  CudaStream& stream = stream_of(ex);
  stream.limit(Finding::kTarget, vocab);
  launch(ex, blocks_for(targets_C.elements(), kThreads), kThreads, find_targets, targets_C.as<std::int32_t>(),
         targets_C.elements(), vocab, stream.findings());
}

void cross_entropy(Exec& ex, const TokenLosses& out, ConstTensorView logits_CV, ConstTensorView targets_C) {
  const std::int64_t vocab = logits_CV.shape[1];
  CudaStream& stream = stream_of(ex);
  stream.limit(Finding::kTarget, vocab);
  with_float_type(out.dlogits_CV.dtype, [&](auto type) {
    using T = decltype(type);
    T* dlogits = out.dlogits_CV.if_given<T>();
    const bool wide = packs<kWide>(vocab, logits_CV.as<float>(), dlogits);
    launch(ex, static_cast<unsigned>(logits_CV.shape[0]), kRowThreads,
           wide ? loss_row<kWide, T> : loss_row<1, T>, out.loss_C.as<float>(), dlogits, logits_CV.as<float>(),
           targets_C.as<std::int32_t>(), vocab, out.scale, stream.findings());
  });
}

}  // namespace portable

void cross_entropy_stats(Exec& ex, TensorView stats_C3, ConstTensorView logits_CV, ConstTensorView targets_C,
                         VocabShard shard) {
  CudaStream& stream = stream_of(ex);
  stream.limit(Finding::kTarget, shard.total);
  const bool wide = packs<kWide>(logits_CV.shape[1], logits_CV.as<float>());
  launch(ex, static_cast<unsigned>(logits_CV.shape[0]), kRowThreads, wide ? stats_row<kWide> : stats_row<1>,
         stats_C3.as<double>(), logits_CV.as<float>(), targets_C.as<std::int32_t>(), logits_CV.shape[1],
         shard.begin, shard.total, stream.findings());
}

void cross_entropy_sharded(Exec& ex, const TokenLosses& out, ConstTensorView logits_CV,
                           ConstTensorView targets_C, ConstTensorView stats_PC3, VocabShard shard) {
  CudaStream& stream = stream_of(ex);
  with_float_type(out.dlogits_CV.dtype, [&](auto type) {
    using T = decltype(type);
    T* dlogits = out.dlogits_CV.if_given<T>();
    const bool wide = packs<kWide>(logits_CV.shape[1], logits_CV.as<float>(), dlogits);
    launch(ex, static_cast<unsigned>(logits_CV.shape[0]), kRowThreads,
           wide ? sharded_row<kWide, T> : sharded_row<1, T>, out.loss_C.as<float>(), dlogits,
           logits_CV.as<float>(), targets_C.as<std::int32_t>(), stats_PC3.as<double>(), stats_PC3.shape[0],
           logits_CV.shape[1], out.scale, shard.begin, shard.total, stream.findings());
  });
}

}  // namespace upmoe::cuda
