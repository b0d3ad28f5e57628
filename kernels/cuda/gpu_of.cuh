#pragma once
// The GPU of an op, as a choice of kernels sees it.

#include "kernels/cuda/choose/gpu.h"
#include "kernels/cuda/library/cudnn_sdpa.h"
#include "kernels/cuda/runtime/stream.cuh"

namespace upmoe::cuda {

inline Gpu gpu_of(const Exec& ex) {
  const CudaStream& stream = stream_of(ex);
  return {.sm = stream.sm(), .cudnn = has_cudnn(), .device = stream.device()};
}

}  // namespace upmoe::cuda
