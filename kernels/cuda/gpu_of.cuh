#pragma once
// The GPU of an op, as a choice of kernels sees it.

#include "kernels/cuda/choose/gpu.h"
#include "kernels/cuda/library/cudnn_sdpa.h"
#include "kernels/cuda/runtime/stream.cuh"

namespace upmoe::cuda {

inline Gpu gpu_of(const Exec& ex) {
  return {.sm = stream_of(ex).sm(), .cudnn = has_cudnn()};
}

}  // namespace upmoe::cuda
