#pragma once
// What the bodies of kernels share, however they are launched: vectors of elements, sums over warps and blocks.

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/core/bf16.h"

namespace upmoe::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// N elements that move as one: 16 bytes is the widest load.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T at[N];
};
// Elements of a 16-byte pack.
template <class T>
constexpr int kPack = 16 / static_cast<int>(sizeof(T));

// In fp32, the elements [i, i + N) of x.
template <int N, class T>
__device__ inline void load_floats(float (&out)[N], const T* x) {
  const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(x);
#pragma unroll
  for (int j = 0; j < N; ++j) out[j] = to_float(pack.at[j]);
}
template <int N, class T>
__device__ inline void store_floats(T* x, const float (&in)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int j = 0; j < N; ++j) pack.at[j] = from_float<T>(in[j]);
  *reinterpret_cast<Pack<T, N>*>(x) = pack;
}
// Rows of `width` elements from these addresses on may move in packs of N.
template <int N, class... T>
bool packs(std::int64_t width, const T*... rows) {
  return width % N == 0 && ((reinterpret_cast<std::uintptr_t>(rows) % (N * sizeof(T)) == 0) && ...);
}

// The sum over the lanes of a warp, in every lane; the order is a tree, the same in every run.
template <class T>
__device__ inline T warp_sum(T x) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
  return x;
}
__device__ inline float warp_max(float x) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, lanes));
  return x;
}
// Over a block of whole warps, in every thread. All threads of the block call it; `memory` holds one value
// for each warp and may be used again behind the next barrier.
template <class T>
__device__ inline T block_sum(T x, T* memory) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp, warps = static_cast<int>(blockDim.x) / kWarp;
  x = warp_sum(x);
  if (threadIdx.x % kWarp == 0) memory[warp] = x;
  __syncthreads();
  T sum = memory[0];
  for (int w = 1; w < warps; ++w) sum += memory[w];
  __syncthreads();
  return sum;
}
__device__ inline float block_max(float x, float* memory) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp, warps = static_cast<int>(blockDim.x) / kWarp;
  x = warp_max(x);
  if (threadIdx.x % kWarp == 0) memory[warp] = x;
  __syncthreads();
  float most = memory[0];
  for (int w = 1; w < warps; ++w) most = fmaxf(most, memory[w]);
  __syncthreads();
  return most;
}

}  // namespace upmoe::cuda
