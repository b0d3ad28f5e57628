#include "kernels/ops/gemm.h"

#include "kernels/ops/backend.h"
#include "kernels/ops/check_tensor.h"
#include "kernels/ops/dispatch.h"
#include "kernels/ops/product_rate.h"

namespace upmoe::ops {

void gemm(Exec& ex, TensorView c_MN, ConstTensorView a, Transpose transpose_a, ConstTensorView b,
          Transpose transpose_b, Accumulate mode, const ConstTensorView* bias_N) {
  check_scratch(ex);
  UPMOE_CHECK(a.shape.rank == 2 && b.shape.rank == 2, "a is {}, b is {}", a.shape.str(), b.shape.str());
  const bool kept_a = transpose_a == Transpose::kNo, kept_b = transpose_b == Transpose::kNo;
  const std::int64_t m = a.shape[kept_a ? 0 : 1], k = a.shape[kept_a ? 1 : 0];
  const std::int64_t n = b.shape[kept_b ? 1 : 0];
  check_float(a, "a");
  check_tensor(ex, a, a.shape, a.dtype, "a");
  check_tensor(ex, b, kept_b ? Shape{k, n} : Shape{n, k}, a.dtype, "b");
  check_float_or(c_MN, a.dtype, "c_MN");
  check_tensor(ex, c_MN, {m, n}, c_MN.dtype, "c_MN");
  if (bias_N != nullptr) {
    UPMOE_CHECK(mode == Accumulate::kOverwrite, "a bias is added to a fresh product only");
    check_tensor(ex, *bias_N, {n}, a.dtype, "bias_N");
  }
  const double read_c = mode == Accumulate::kAdd ? bytes_of(c_MN) : 0.0;
  const double read_bias = bias_N != nullptr ? bytes_of(*bias_N) : 0.0;
  const double flops = 2.0 * static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k);
  ex.book("gemm", flops, bytes_of(a) + bytes_of(b) + read_c + read_bias, bytes_of(c_MN));
  const TimedProduct timed(ex, a.dtype, flops);
  dispatch(ex, cpu::gemm, cuda::gemm, c_MN, a, transpose_a, b, transpose_b, mode, bias_N);
}

void bias_backward(Exec& ex, TensorView db_N, ConstTensorView dy_TN) {
  check_scratch(ex);
  check_float(dy_TN, "dy_TN");
  UPMOE_CHECK(dy_TN.shape.rank == 2, "dy_TN is {}", dy_TN.shape.str());
  check_tensor(ex, dy_TN, dy_TN.shape, dy_TN.dtype, "dy_TN");
  check_float_or(db_N, dy_TN.dtype, "db_N");
  check_tensor(ex, db_N, {dy_TN.shape[1]}, db_N.dtype, "db_N");
  ex.book("bias_backward", static_cast<double>(dy_TN.elements()), bytes_of(dy_TN) + bytes_of(db_N),
          bytes_of(db_N));
  dispatch(ex, cpu::bias_backward, cuda::bias_backward, db_N, dy_TN);
}

}  // namespace upmoe::ops
