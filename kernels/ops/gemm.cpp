#include "kernels/ops/gemm.h"

#include "kernels/ops/check_tensor.h"
#include "kernels/ops/dispatch.h"
#include "kernels/ops/product_rate.h"

namespace upmoe::ops {

void gemm(Exec& ex, TensorView c_MN, const Factor& a_MK, const Factor& b_KN, Accumulate mode,
          ConstTensorView bias_N) {
  check_scratch(ex);
  const ConstTensorView &a = a_MK.stored, &b = b_KN.stored;
  UPMOE_CHECK(a.shape.rank == 2 && b.shape.rank == 2, "a is {}, b is {}", a.shape.str(), b.shape.str());
  const std::int64_t m = a_MK.rows(), k = a_MK.columns(), n = b_KN.columns();
  check_float(a, "a");
  check_tensor(ex, a, a.shape, a.dtype, "a");
  check_tensor(ex, b, b_KN.transposed() ? Shape{n, k} : Shape{k, n}, a.dtype, "b");
  check_float_or(c_MN, a.dtype, "c_MN");
  check_tensor(ex, c_MN, {m, n}, c_MN.dtype, "c_MN");
  if (bias_N.given()) {
    UPMOE_CHECK(mode == Accumulate::kOverwrite, "a bias is added to a fresh product only");
    check_tensor(ex, bias_N, {n}, a.dtype, "bias_N");
  }
  const double read_c = mode == Accumulate::kAdd ? bytes_of(c_MN) : 0.0;
  const double read_bias = bias_N.given() ? bytes_of(bias_N) : 0.0;
  const double flops = 2.0 * static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k);
  ex.book("gemm", flops, bytes_of(a) + bytes_of(b) + read_c + read_bias, bytes_of(c_MN), Work::kProduct);
  const TimedProduct timed(ex, a.dtype, flops);
  dispatch(ex, &Backend::gemm, c_MN, a_MK, b_KN, mode, bias_N);
}

void bias_backward(Exec& ex, GradientView db_N, ConstTensorView dy_TN) {
  check_scratch(ex);
  check_float(dy_TN, "dy_TN");
  UPMOE_CHECK(dy_TN.shape.rank == 2, "dy_TN is {}", dy_TN.shape.str());
  check_tensor(ex, dy_TN, dy_TN.shape, dy_TN.dtype, "dy_TN");
  check_float_or(db_N, dy_TN.dtype, "db_N");
  check_tensor(ex, db_N, {dy_TN.shape[1]}, db_N.dtype, "db_N");
  ex.book("bias_backward", static_cast<double>(dy_TN.elements()), bytes_of(dy_TN) + bytes_if_added(db_N),
          bytes_of(db_N));
  dispatch(ex, &Backend::bias_backward, db_N, dy_TN);
}

}  // namespace upmoe::ops
