#include "kernels/ops/norm.h"

#include "kernels/ops/check_tensor.h"
#include "kernels/ops/dispatch.h"

namespace upmoe::ops {

namespace {

// What all norms share: x is [T, D], the weight [D] of the same dtype, rstd [T] fp32.
void check_norm(const Exec& ex, const ConstTensorView& x_TD, const ConstTensorView& w_D,
                const ConstTensorView& rstd_T, std::source_location where = std::source_location::current()) {
  check_float(x_TD, "x_TD", where);
  if (x_TD.shape.rank != 2 || x_TD.shape[1] == 0)
    fail_check("x is [T, D], D > 0", where, "x_TD is " + x_TD.shape.str());
  check_tensor(ex, x_TD, x_TD.shape, x_TD.dtype, "x_TD", where);
  check_tensor(ex, w_D, {x_TD.shape[1]}, x_TD.dtype, "w_D", where);
  check_tensor(ex, rstd_T, {x_TD.shape[0]}, DType::kF32, "rstd_T", where);
}

}  // namespace

void rms_norm_forward(Exec& ex, TensorView y_TD, TensorView rstd_T, ConstTensorView x_TD,
                      const NormWeight& weight) {
  check_norm(ex, x_TD, weight.w_D, rstd_T);
  check_tensor(ex, y_TD, x_TD.shape, x_TD.dtype, "y_TD");
  ex.book("rms_norm_forward", 4.0 * static_cast<double>(x_TD.elements()),
          bytes_of(x_TD) + bytes_of(weight.w_D), bytes_of(y_TD) + bytes_of(rstd_T));
  dispatch(ex, &Backend::rms_norm_forward, y_TD, rstd_T, x_TD, weight);
}

void add_rms_norm_forward(Exec& ex, TensorView y_TD, TensorView sum_TD, TensorView rstd_T,
                          ConstTensorView x_TD, ConstTensorView residual_TD, const NormWeight& weight) {
  check_norm(ex, x_TD, weight.w_D, rstd_T);
  check_tensor(ex, y_TD, x_TD.shape, x_TD.dtype, "y_TD");
  check_tensor(ex, sum_TD, x_TD.shape, x_TD.dtype, "sum_TD");
  check_tensor(ex, residual_TD, x_TD.shape, x_TD.dtype, "residual_TD");
  ex.book("add_rms_norm_forward", 5.0 * static_cast<double>(x_TD.elements()),
          2 * bytes_of(x_TD) + bytes_of(weight.w_D), 2 * bytes_of(y_TD) + bytes_of(rstd_T));
  dispatch(ex, &Backend::add_rms_norm_forward, y_TD, sum_TD, rstd_T, x_TD, residual_TD, weight);
}

void rms_norm_backward(Exec& ex, TensorView dx_TD, TensorView dw_D, ConstTensorView dy_TD,
                       const NormedRows& rows, ConstTensorView w_D, Accumulate mode) {
  const auto& [x_TD, rstd_T] = rows;
  check_scratch(ex);
  check_norm(ex, x_TD, w_D, rstd_T);
  check_tensor(ex, dy_TD, x_TD.shape, x_TD.dtype, "dy_TD");
  check_tensor(ex, dx_TD, x_TD.shape, x_TD.dtype, "dx_TD");
  check_float_or(dw_D, x_TD.dtype, "dw_D");
  check_tensor(ex, dw_D, w_D.shape, dw_D.dtype, "dw_D");
  const double dx_read = mode == Accumulate::kAdd ? bytes_of(dx_TD) : 0.0;
  ex.book("rms_norm_backward", 11.0 * static_cast<double>(x_TD.elements()),
          bytes_of(dy_TD) + bytes_of(x_TD) + bytes_of(w_D) + bytes_of(rstd_T) + bytes_of(dw_D) + dx_read,
          bytes_of(dx_TD) + bytes_of(dw_D));
  dispatch(ex, &Backend::rms_norm_backward, dx_TD, dw_D, dy_TD, rows, w_D, mode);
}

}  // namespace upmoe::ops
