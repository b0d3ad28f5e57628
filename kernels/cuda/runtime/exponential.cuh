#pragma once

#include <cuda_runtime.h>

namespace upmoe::cuda {

// kFast: the special function unit's, for what is rounded to bf16, which keeps 8 bits of it.
template <bool kFast>
__device__ inline float exponential(float x) {
  return kFast ? __expf(x) : expf(x);
}

}  // namespace upmoe::cuda
