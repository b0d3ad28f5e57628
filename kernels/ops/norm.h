#pragma once
// Root-mean-square norm: y = w * (x * rstd), rstd = 1 / sqrt(mean(x^2) + eps) in fp32 per row. With bf16 the
// normalised x is rounded to bf16 before it is multiplied by w, as transformers does.
// x, y, w: fp32 or bf16, the same; rstd_T: fp32.

#include "kernels/core/exec.h"

namespace upmoe {
struct NormWeight {
  ConstTensorView w_D;
  float eps = 0;
};
// Input of a norm as its backward knows it.
struct NormedRows {
  ConstTensorView x_TD, rstd_T;
};
}  // namespace upmoe

namespace upmoe::ops {

void rms_norm_forward(Exec& ex, TensorView y_TD, TensorView rstd_T, ConstTensorView x_TD,
                      const NormWeight& weight);

// sum_TD = x_TD + residual_TD (may alias either), y_TD = norm of sum_TD, in one pass.
void add_rms_norm_forward(Exec& ex, TensorView y_TD, TensorView sum_TD, TensorView rstd_T,
                          ConstTensorView x_TD, ConstTensorView residual_TD, const NormWeight& weight);

// dx_TD (+)= gradient of the input (mode says which), dw_D += gradient of the weight, summed over rows in an
// order that does not depend on the number of threads. dx may alias dy.
void rms_norm_backward(Exec& ex, TensorView dx_TD, TensorView dw_D, ConstTensorView dy_TD,
                       const NormedRows& rows, ConstTensorView w_D, Accumulate mode);

}  // namespace upmoe::ops
