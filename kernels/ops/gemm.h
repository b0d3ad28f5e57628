#pragma once
// Dense matrix products. Inputs fp32 or bf16 (both the same), sums in fp32, output fp32 or the inputs' dtype.

#include "kernels/core/exec.h"

namespace upmoe {
enum class Transpose : std::uint8_t { kNo, kYes };

// A factor of a product as it is stored, and whether it is multiplied as that or transposed.
struct Factor {
  ConstTensorView stored;
  Transpose transpose = Transpose::kNo;
  bool transposed() const { return transpose == Transpose::kYes; }
  std::int64_t rows() const { return stored.shape[transposed() ? 1 : 0]; }
  std::int64_t columns() const { return stored.shape[transposed() ? 0 : 1]; }
};
}  // namespace upmoe

namespace upmoe::ops {

// c_MN = a_MK b_KN [+ bias_N], or c_MN += a_MK b_KN. A Linear weight, stored [N, K], is the factor {w_NK, kYes}.
// bias_N: dtype of the factors; may be absent; only with kOverwrite. M, N or K may be 0 (K = 0 gives zeros or the
// bias). A bf16 result is rounded once on the CPU; cuBLASLt's kernels may round the product before they add to it.
void gemm(Exec& ex, TensorView c_MN, const Factor& a_MK, const Factor& b_KN, Accumulate mode,
          ConstTensorView bias_N = {});

// db_N (+)= sum over rows of dy_TN, in fp32, in an order that does not depend on the number of threads.
void bias_backward(Exec& ex, GradientView db_N, ConstTensorView dy_TN);

}  // namespace upmoe::ops
