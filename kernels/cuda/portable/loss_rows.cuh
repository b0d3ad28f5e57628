#pragma once
// Rows of logits, as the kernels of losses read them: a block has a row.

#include "kernels/cuda/runtime/exponential.cuh"
#include "kernels/cuda/runtime/launch.cuh"

namespace upmoe::cuda {

// A block reads its row in strides of all its threads, a pack at a time:
//
//   x    | t0: N | t1: N | ... | t1023: N | t0: N | t1: N | ...
constexpr int kRowThreads = 1024;  // one block, one row of logits
constexpr int kWide = 4;           // logits of a pack

// The gradient of a row that is ignored.
template <class T>
__device__ inline void clear_row(T* dx, std::int64_t n) {
  if (dx == nullptr) return;
  for (std::int64_t i = threadIdx.x; i < n; i += kRowThreads) dx[i] = from_float<T>(0.0f);
}

__device__ inline bool is_target(std::int32_t target, std::int64_t vocab) {
  return target >= -1 && target < vocab;
}

// A target that the vocabulary does not have is reported and counts as ignored.
__device__ inline std::int32_t checked_target(const std::int32_t* targets, std::int64_t vocab,
                                              FindingWords findings) {
  const std::int32_t target = targets[blockIdx.x];
  if (is_target(target, vocab)) return target;
  if (threadIdx.x == 0) find(findings, Finding::kTarget, blockIdx.x, static_cast<std::uint32_t>(target));
  return -1;
}

}  // namespace upmoe::cuda
