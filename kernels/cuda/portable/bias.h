#pragma once
// What stands before a dense product.

#include "kernels/core/exec.h"

namespace upmoe::cuda {

// c_MN = bias_N in every row, or zeros: what a product over nothing gives, and what one of another dtype adds to.
void start_from_bias(const Exec& ex, const TensorView& c_MN, const ConstTensorView& bias_N);

}  // namespace upmoe::cuda
