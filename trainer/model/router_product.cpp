#include "trainer/model/router_product.h"

#include "kernels/ops/gemm.h"
#include "kernels/ops/pointwise.h"

namespace upmoe {

namespace {

// As a product takes it beside a weight of this dtype: rows of another one are copied.
ConstTensorView in_dtype(Exec& ex, DType dtype, ConstTensorView rows, const char* what) {
  if (rows.dtype == dtype) return rows;
  const TensorView copy = ex.scratch->take(rows.shape, dtype, what);
  ops::cast(ex, copy, rows);
  return copy;
}

}  // namespace

void RouterProduct::forward(Exec& ex, TensorView logits_TE, ConstTensorView x_TD) const {
  ops::gemm(ex, logits_TE, {in_dtype(ex, weight_ED.value.dtype, x_TD, "router input, widened")},
            {weight_ED.value, Transpose::kYes}, Accumulate::kOverwrite);
}

void RouterProduct::backward(Exec& ex, TensorView dx_TD, ConstTensorView dlogits_TE,
                             ConstTensorView x_TD) const {
  const DType dtype = weight_ED.value.dtype;
  const ConstTensorView dy_TE = in_dtype(ex, dtype, dlogits_TE, "router logit gradient, rounded");
  add_input_gradient(ex, dx_TD, dy_TE);
  if (!weight_ED.wants_grad()) return;
  const GradientView dw_ED = weight_ED.write_grad();
  ops::gemm(ex, dw_ED, {dy_TE, Transpose::kYes}, {in_dtype(ex, dtype, x_TD, "router input, widened again")},
            dw_ED.mode);
}

void RouterProduct::add_input_gradient(Exec& ex, TensorView dx_TD, ConstTensorView dy_TE) const {
  const DType dtype = weight_ED.value.dtype;
  if (dx_TD.dtype == dtype) {
    ops::gemm(ex, dx_TD, {dy_TE}, {weight_ED.value}, Accumulate::kAdd);
    return;
  }
  ScratchScope scope(*ex.scratch);
  const TensorView wide_TD = ex.scratch->take(dx_TD.shape, dtype, "router input gradient, widened");
  ops::cast(ex, wide_TD, dx_TD);
  ops::gemm(ex, wide_TD, {dy_TE}, {weight_ED.value}, Accumulate::kAdd);
  ops::cast(ex, dx_TD, wide_TD);
}

}  // namespace upmoe
