#include "trainer/model/linear.h"

#include "kernels/ops/gemm.h"

namespace upmoe {

void Linear::forward(Exec& ex, TensorView y_TN, ConstTensorView x_TK) const {
  ops::gemm(ex, y_TN, {x_TK}, {weight_NK.value, Transpose::kYes}, Accumulate::kOverwrite,
            bias_N ? bias_N->value : TensorView{});
  if (!adapter) return;
  ScratchScope scope(*ex.scratch);
  ops::add_low_rank(ex, y_TN, x_TK, adapter->factors(ex));
}

void Linear::backward_bias(Exec& ex, ConstTensorView dy_TN) const {
  if (bias_N && bias_N->wants_grad()) ops::bias_backward(ex, bias_N->write_grad(), dy_TN);
}

void Linear::backward_adapter(Exec& ex, TensorView dx_TK, ConstTensorView dy_TN, ConstTensorView x_TK) const {
  if (!adapter) return;
  ScratchScope scope(*ex.scratch);
  Exec again = not_booked(ex);
  const LowRank w = adapter->factors(again);
  const TensorView dz_TL = ex.scratch->take({dy_TN.rows(), w.rank()}, dy_TN.dtype, "low-rank rows' gradient");
  ops::low_rank_dgrad(ex, dx_TK, dz_TL, dy_TN, w);
  if (!adapter->wants_grad()) return;
  const LowRankGradient dw = adapter->gradients(ex);
  ops::low_rank_wgrad(ex, dw, dz_TL, dy_TN, x_TK, w);
  adapter->share_gradients(ex, dw);
}

void Linear::backward_products(Exec& ex, TensorView dx_TK, Accumulate mode, ConstTensorView dy_TN,
                               ConstTensorView x_TK) const {
  ops::gemm(ex, dx_TK, {dy_TN}, {weight_NK.value}, mode);
  backward_adapter(ex, dx_TK, dy_TN, x_TK);
  if (!weight_NK.wants_grad()) return;
  const GradientView dw_NK = weight_NK.write_grad();
  ops::gemm(ex, dw_NK, {dy_TN, Transpose::kYes}, {x_TK}, dw_NK.mode);
}

void Linear::backward(Exec& ex, TensorView dx_TK, Accumulate mode, ConstTensorView dy_TN,
                      ConstTensorView x_TK) const {
  backward_products(ex, dx_TK, mode, dy_TN, x_TK);
  backward_bias(ex, dy_TN);
}

}  // namespace upmoe
