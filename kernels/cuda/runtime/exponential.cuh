#pragma once

#include <cuda_runtime.h>

#include <limits>

namespace upmoe::cuda {

// The largest logit of those that are yet to come. A number, and not -inf: of a logit x that is -inf, exp(x - largest)
// is nothing, while exp(-inf - -inf) would be no number.
constexpr float kLeastLogit = std::numeric_limits<float>::lowest();

// kFast: the special function unit's, for what is rounded to bf16, which keeps 8 bits of it.
template <bool kFast>
__device__ inline float exponential(float x) {
  return kFast ? __expf(x) : expf(x);
}

}  // namespace upmoe::cuda
