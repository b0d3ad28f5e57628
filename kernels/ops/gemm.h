#pragma once
// Dense matrix products. Inputs fp32 or bf16 (both the same), sums in fp32, output fp32 or the inputs' dtype.

#include "kernels/core/exec.h"

namespace upmoe {
enum class Transpose : std::uint8_t { kNo, kYes };
}

namespace upmoe::ops {

// c_MN = op(a) op(b) [+ bias_N], or c_MN += op(a) op(b). op(a) is [M, K], so `a` is stored [M, K] or, with
// kYes, [K, M]; op(b) is [K, N], so a Linear weight [N, K] is passed with kYes. bias_N: dtype of the inputs;
// only with kOverwrite. M, N or K may be 0 (K = 0 gives zeros or the bias). A bf16 result is rounded once on
// the CPU; cuBLASLt's kernels may round the product before they add to it.
void gemm(Exec& ex, TensorView c_MN, ConstTensorView a, Transpose transpose_a, ConstTensorView b,
          Transpose transpose_b, Accumulate mode, const ConstTensorView* bias_N = nullptr);

// db_N += sum over rows of dy_TN, in fp32, in an order that does not depend on the number of threads.
void bias_backward(Exec& ex, TensorView db_N, ConstTensorView dy_TN);

}  // namespace upmoe::ops
