#include <cublasLt.h>
#include <cuda_runtime.h>

#include "kernels/core/gpu.h"
#include "kernels/cuda/runtime/stream.cuh"

namespace upmoe {

ProductLibrary gpu::product_library() {
  cudaDeviceProp properties;
  cuda::check(cudaGetDeviceProperties(&properties, current()));
  return {properties.name, static_cast<int>(cublasLtGetVersion())};
}

}  // namespace upmoe
