#include "trainer/model/rms_norm.h"

#include "kernels/ops/norm.h"
#include "kernels/ops/pointwise.h"

namespace upmoe {

void RmsNorm::forward(Exec& ex, TensorView y_TD, ConstTensorView x_TD, Arena& keep, Saved& saved) const {
  saved.x_TD = x_TD;
  saved.rstd_T = keep.take({x_TD.rows()}, DType::kF32, "norm rstd");
  ops::rms_norm_forward(ex, y_TD, saved.rstd_T, x_TD, {weight_D.value, eps, plus_one});
}

void RmsNorm::forward_add(Exec& ex, TensorView y_TD, TensorView sum_TD, ConstTensorView x_TD,
                          ConstTensorView residual_TD, Arena& keep, Saved& saved) const {
  saved.x_TD = sum_TD;
  saved.rstd_T = keep.take({x_TD.rows()}, DType::kF32, "norm rstd");
  ops::add_rms_norm_forward(ex, y_TD, sum_TD, saved.rstd_T, x_TD, residual_TD,
                            {weight_D.value, eps, plus_one});
}

void RmsNorm::backward(Exec& ex, TensorView dx_TD, Accumulate mode, ConstTensorView dy_TD,
                       const Saved& saved) const {
  ScratchScope scope(*ex.scratch);
  TensorView dw_D = weight_D.grad;
  // Frozen: the op computes both gradients in one pass, so this one goes nowhere.
  if (!weight_D.wants_grad()) {
    dw_D = ex.scratch->take(weight_D.value.shape, weight_D.value.dtype, "unwanted norm gradient");
    ops::fill(ex, dw_D, 0.0f);
  }
  ops::rms_norm_backward(ex, dx_TD, dw_D, dy_TD, {saved.x_TD, saved.rstd_T}, {weight_D.value, eps, plus_one},
                         mode);
}

}  // namespace upmoe
