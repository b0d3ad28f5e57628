#include "trainer/model/norm.h"

#include "kernels/ops/layer_norm.h"
#include "kernels/ops/norm.h"
#include "kernels/ops/pointwise.h"

namespace upmoe {
namespace {

NormWeight weight_of(const Norm& norm) {
  return {norm.weight_D.value, norm.eps, norm.kind == NormKind::kRmsPlusOne};
}

}  // namespace

ConstTensorView summed(Exec& ex, const Residual& residual) {
  if (!residual.branch_TD.given()) return residual.x_TD;
  ops::add(ex, residual.sum_TD, residual.x_TD, residual.branch_TD);
  return residual.sum_TD;
}

void Norm::forward(Exec& ex, TensorView y_TD, const Residual& residual, Arena& keep, Saved& saved) const {
  const std::int64_t rows = residual.x_TD.rows();
  saved.rstd_T = keep.take({rows}, DType::kF32, "norm rstd");
  if (kind == NormKind::kLayerNorm) {
    saved.mean_T = keep.take({rows}, DType::kF32, "norm mean");
    saved.x_TD = summed(ex, residual);
    ops::layer_norm_forward(ex, y_TD, {saved.mean_T, saved.rstd_T}, saved.x_TD, weight_D.value, eps);
  } else if (residual.branch_TD.given()) {
    saved.x_TD = residual.sum_TD;
    ops::add_rms_norm_forward(ex, y_TD, residual.sum_TD, saved.rstd_T, residual.branch_TD, residual.x_TD,
                              weight_of(*this));
  } else {
    saved.x_TD = residual.x_TD;
    ops::rms_norm_forward(ex, y_TD, saved.rstd_T, residual.x_TD, weight_of(*this));
  }
}

void Norm::again(Exec& ex, TensorView y_TD, const Saved& saved) const {
  if (kind == NormKind::kLayerNorm)
    return ops::layer_norm_forward(ex, y_TD, {saved.mean_T, saved.rstd_T}, saved.x_TD, weight_D.value, eps);
  ops::rms_norm_forward(ex, y_TD, saved.rstd_T, saved.x_TD, weight_of(*this));
}

void Norm::backward(Exec& ex, TensorView dx_TD, Accumulate mode, ConstTensorView dy_TD,
                    const Saved& saved) const {
  ScratchScope scope(*ex.scratch);
  const GradientView dw_D = gradient_or_scratch(ex, weight_D, "unwanted norm gradient");
  if (kind == NormKind::kLayerNorm)
    return ops::layer_norm_backward(ex, dx_TD, dw_D, dy_TD, {saved.x_TD, saved.mean_T, saved.rstd_T},
                                    weight_D.value, mode);
  ops::rms_norm_backward(ex, dx_TD, dw_D, dy_TD, {saved.x_TD, saved.rstd_T}, weight_of(*this), mode);
}

}  // namespace upmoe
