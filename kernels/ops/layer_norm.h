#pragma once
// LayerNorm without a bias: y = w * (x - mean) * rstd, rstd = 1 / sqrt(mean((x - mean)^2) + eps), in fp32 per row and
// rounded once, as torch.nn.LayerNorm does. x, y, w: fp32 or bf16, the same; mean_T and rstd_T: fp32.

#include "kernels/core/exec.h"

namespace upmoe {
struct RowMoments {
  TensorView mean_T, rstd_T;
};
// Input of the norm as its backward knows it.
struct CentredRows {
  ConstTensorView x_TD, mean_T, rstd_T;
};
}  // namespace upmoe

namespace upmoe::ops {

void layer_norm_forward(Exec& ex, TensorView y_TD, const RowMoments& moments, ConstTensorView x_TD,
                        ConstTensorView w_D, float eps);

// dx_TD (+)= gradient of the input (mode says which), dw_D (+)= gradient of the weight, summed over rows in an order
// that does not depend on the number of threads. dx may alias dy.
void layer_norm_backward(Exec& ex, TensorView dx_TD, GradientView dw_D, ConstTensorView dy_TD,
                         const CentredRows& rows, ConstTensorView w_D, Accumulate mode);

}  // namespace upmoe::ops
