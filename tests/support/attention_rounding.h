#pragma once
// What attention on the CPU rounds in bf16 beside its results.

#include "kernels/cpu/dense_product.h"
#include "tests/support/test_device.h"
#include "tests/support/tolerance.h"

namespace upmoe::test {

// By how much of the largest value rounding moves an output: blocks multiply probabilities that are rounded to bf16
// where the processor multiplies pairs of them, half of a last place each, and the probabilities of a row add up to
// one.
inline double rounding_of_probabilities(DType dtype) {
  const bool rounded = dtype == DType::kBF16 && !on_gpu() && cpu::packed_blocks_have_bf16_instruction();
  return rounded ? kBF16Unit / 2 : 0;
}

}  // namespace upmoe::test
