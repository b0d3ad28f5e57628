#pragma once
// How kernels are launched, and what their bodies share (block.cuh). What includes this compiles for every GPU and,
// against tests/support/fake_cuda, for the CPU: no <<<>>>, dynamic shared memory through dynamic_shared(), and no
// inline assembly, which has a file of its own for each architecture (kernels/cuda/sm90/sm90_ptx.cuh).

#include <cuda_runtime.h>

#include <cstdint>
#include <utility>

#include "kernels/cuda/runtime/block.cuh"
#include "kernels/cuda/runtime/stream.cuh"

namespace upmoe::cuda {

constexpr int kThreads = 256;  // of a block, where nothing speaks for another number

inline unsigned blocks_for(std::int64_t items, std::int64_t items_per_block) {
  return static_cast<unsigned>((items + items_per_block - 1) / items_per_block);
}

// Nothing is launched for an empty grid.
template <class... Parameters, class... Arguments>
void launch_shared(const Exec& ex, std::size_t shared_bytes, dim3 grid, dim3 block,
                   void (*kernel)(Parameters...), Arguments&&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream_of(ex).raw();
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(std::forward<Arguments>(arguments))...));
}
template <class... Parameters, class... Arguments>
void launch(const Exec& ex, dim3 grid, dim3 block, void (*kernel)(Parameters...), Arguments&&... arguments) {
  launch_shared(ex, 0, grid, block, kernel, std::forward<Arguments>(arguments)...);
}

#ifdef __CUDACC__
template <class T>
__device__ T* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
}
#else
template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(simt::dynamic_shared());
}
#endif

__device__ inline std::int64_t global_thread() {
  return static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

// Reports that row `row` holds `value`, which must not be.
__device__ inline void find(FindingWords findings, Finding kind, std::int64_t row, std::uint32_t value) {
  const auto word = static_cast<unsigned long long>(row) << 32 | value;
  atomicMin(findings + static_cast<int>(kind), word);
}

}  // namespace upmoe::cuda
