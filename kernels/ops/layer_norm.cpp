#include "kernels/ops/layer_norm.h"

#include "kernels/ops/check_tensor.h"
#include "kernels/ops/dispatch.h"

namespace upmoe::ops {

namespace {

// x is [T, D], the weight [D] of the same dtype, what is known of the rows [T] fp32.
void check_layer_norm(const Exec& ex, const CentredRows& rows, const ConstTensorView& w_D,
                      std::source_location where = std::source_location::current()) {
  const ConstTensorView& x_TD = rows.x_TD;
  check_float(x_TD, "x_TD", where);
  if (x_TD.shape.rank != 2 || x_TD.shape[1] == 0)
    fail_check("x is [T, D], D > 0", where, "x_TD is " + x_TD.shape.str());
  check_tensor(ex, x_TD, x_TD.shape, x_TD.dtype, "x_TD", where);
  check_tensor(ex, w_D, {x_TD.shape[1]}, x_TD.dtype, "w_D", where);
  check_tensor(ex, rows.mean_T, {x_TD.shape[0]}, DType::kF32, "mean_T", where);
  check_tensor(ex, rows.rstd_T, {x_TD.shape[0]}, DType::kF32, "rstd_T", where);
}

}  // namespace

void layer_norm_forward(Exec& ex, TensorView y_TD, const RowMoments& moments, ConstTensorView x_TD,
                        ConstTensorView w_D, float eps) {
  check_layer_norm(ex, {x_TD, moments.mean_T, moments.rstd_T}, w_D);
  check_tensor(ex, y_TD, x_TD.shape, x_TD.dtype, "y_TD");
  ex.book("layer_norm_forward", 6.0 * static_cast<double>(x_TD.elements()), bytes_of(x_TD) + bytes_of(w_D),
          bytes_of(y_TD) + bytes_of(moments.mean_T) + bytes_of(moments.rstd_T));
  dispatch(ex, &Backend::layer_norm_forward, y_TD, moments, x_TD, w_D, eps);
}

void layer_norm_backward(Exec& ex, TensorView dx_TD, GradientView dw_D, ConstTensorView dy_TD,
                         const CentredRows& rows, ConstTensorView w_D, Accumulate mode) {
  const ConstTensorView& x_TD = rows.x_TD;
  check_scratch(ex);
  check_layer_norm(ex, rows, w_D);
  check_tensor(ex, dy_TD, x_TD.shape, x_TD.dtype, "dy_TD");
  check_tensor(ex, dx_TD, x_TD.shape, x_TD.dtype, "dx_TD");
  check_float_or(dw_D, x_TD.dtype, "dw_D");
  check_tensor(ex, dw_D, w_D.shape, dw_D.dtype, "dw_D");
  const double dx_read = mode == Accumulate::kAdd ? bytes_of(dx_TD) : 0.0;
  ex.book("layer_norm_backward", 14.0 * static_cast<double>(x_TD.elements()),
          bytes_of(dy_TD) + bytes_of(x_TD) + bytes_of(w_D) + bytes_of(rows.mean_T) + bytes_of(rows.rstd_T) +
              bytes_if_added(dw_D) + dx_read,
          bytes_of(dx_TD) + bytes_of(dw_D));
  dispatch(ex, &Backend::layer_norm_backward, dx_TD, dw_D, dy_TD, rows, w_D, mode);
}

}  // namespace upmoe::ops
