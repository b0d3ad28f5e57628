#include "trainer/model/norm.h"

#include "kernels/ops/layer_norm.h"
#include "kernels/ops/norm.h"
#include "kernels/ops/pointwise.h"

namespace upmoe {
namespace {

NormWeight weight_of(const Norm& norm) {
  return {norm.weight_D.value, norm.eps, norm.kind == NormKind::kRmsPlusOne};
}

void keep_moments(const Norm& norm, ConstTensorView x_TD, Arena& keep, Norm::Saved& saved) {
  saved.x_TD = x_TD;
  saved.rstd_T = keep.take({x_TD.rows()}, DType::kF32, "norm rstd");
  if (norm.kind == NormKind::kLayerNorm) saved.mean_T = keep.take({x_TD.rows()}, DType::kF32, "norm mean");
}

}  // namespace

void Norm::forward(Exec& ex, TensorView y_TD, ConstTensorView x_TD, Arena& keep, Saved& saved) const {
  keep_moments(*this, x_TD, keep, saved);
  if (kind == NormKind::kLayerNorm)
    return ops::layer_norm_forward(ex, y_TD, {saved.mean_T, saved.rstd_T}, x_TD, weight_D.value, eps);
  ops::rms_norm_forward(ex, y_TD, saved.rstd_T, x_TD, weight_of(*this));
}

void Norm::forward_add(Exec& ex, TensorView y_TD, TensorView sum_TD, ConstTensorView x_TD,
                       ConstTensorView residual_TD, Arena& keep, Saved& saved) const {
  if (kind == NormKind::kLayerNorm) {
    ops::add(ex, sum_TD, x_TD, residual_TD);
    return forward(ex, y_TD, sum_TD, keep, saved);
  }
  keep_moments(*this, sum_TD, keep, saved);
  ops::add_rms_norm_forward(ex, y_TD, sum_TD, saved.rstd_T, x_TD, residual_TD, weight_of(*this));
}

void Norm::backward(Exec& ex, TensorView dx_TD, Accumulate mode, ConstTensorView dy_TD,
                    const Saved& saved) const {
  ScratchScope scope(*ex.scratch);
  TensorView dw_D = weight_D.grad;
  // Frozen: the op computes both gradients in one pass, so this one goes nowhere.
  if (!weight_D.wants_grad()) {
    dw_D = ex.scratch->take(weight_D.value.shape, weight_D.value.dtype, "unwanted norm gradient");
    ops::fill(ex, dw_D, 0.0f);
  }
  if (kind == NormKind::kLayerNorm)
    return ops::layer_norm_backward(ex, dx_TD, dw_D, dy_TD, {saved.x_TD, saved.mean_T, saved.rstd_T},
                                    weight_D.value, mode);
  ops::rms_norm_backward(ex, dx_TD, dw_D, dy_TD, {saved.x_TD, saved.rstd_T}, weight_of(*this), mode);
}

}  // namespace upmoe
