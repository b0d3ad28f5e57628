#pragma once
// A token's experts over the lanes of a warp.

#include "kernels/cuda/runtime/launch.cuh"

namespace upmoe::cuda {

// A lane's values are registers, so how many there are is a constant of the kernel:
//
//   lane        0      1     ...   31
//   value[0]   e 0    e 1    ...  e 31
//   value[1]   e 32   e 33   ...  e 63
//   ...                                  behind the last expert: nothing that could be chosen
//
// body(std::integral_constant<int, N>) with the least N whose warps hold `experts`.
template <class Body>
void with_experts_per_lane(std::int64_t experts, Body&& body) {
  if (experts <= kWarp * 2) return body(std::integral_constant<int, 2>{});
  if (experts <= kWarp * 8) return body(std::integral_constant<int, 8>{});
  UPMOE_CHECK(experts <= kWarp * 32, "{} experts, at most {} on a GPU", experts, kWarp * 32);
  body(std::integral_constant<int, 32>{});
}

// A value and whose it is; the lowest expert among equals.
struct Best {
  float value;
  int expert;
};
__device__ inline Best better(Best a, Best b) {
  return b.value > a.value || (b.value == a.value && b.expert < a.expert) ? b : a;
}
// The butterfly leaves the same best in every lane, whatever its own were.
__device__ inline Best best_of_warp(Best best) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2)
    best = better(best, {__shfl_xor_sync(kAllLanes, best.value, lanes),
                         __shfl_xor_sync(kAllLanes, best.expert, lanes)});
  return best;
}
// Of the experts that `takes` lets in; one beyond the last, with minus infinity, where there are none.
template <int N, class Takes>
__device__ Best largest(const float (&value)[N], int lane, const Takes& takes) {
  Best best{-INFINITY, 1 << 30};
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (takes(i * kWarp + lane)) best = better(best, {value[i], i * kWarp + lane});
  return best_of_warp(best);
}

}  // namespace upmoe::cuda
