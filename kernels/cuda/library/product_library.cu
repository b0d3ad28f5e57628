// What a table of algorithms is for, as kernels/core asks for it; cublaslt.cu has the library, and alone chooses by the
// table.

#include <cuda_runtime.h>

#include "kernels/core/gpu.h"
#include "kernels/cuda/library/cublaslt.cuh"

namespace upmoe {

ProductLibrary gpu::product_library() {
  return {device_name(current()), static_cast<int>(cuda::cublaslt_version())};
}

}  // namespace upmoe
