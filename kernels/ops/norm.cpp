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

// qkv is [T, H], what is kept [T, P] of its dtype, the weights [head_dim].
void check_heads(const Exec& ex, const ConstTensorView& qkv_TH, const ConstTensorView& x_TP,
                 const ConstTensorView& rstd_TN, const QkWeights& weights, const AttentionShape& s,
                 std::source_location where = std::source_location::current()) {
  check_float(qkv_TH, "qkv_TH", where);
  if (qkv_TH.shape.rank != 2 || s.heads <= 0 || s.kv_heads <= 0 || s.head_dim <= 0)
    fail_check("qkv is [T, H], of at least one head", where, "qkv_TH is " + qkv_TH.shape.str());
  const std::int64_t tokens = qkv_TH.shape[0], heads = s.heads + s.kv_heads;
  check_tensor(ex, qkv_TH, {tokens, s.qkv_width()}, qkv_TH.dtype, "qkv_TH", where);
  check_tensor(ex, x_TP, {tokens, heads * s.head_dim}, qkv_TH.dtype, "x_TP", where);
  check_tensor(ex, rstd_TN, {tokens, heads}, DType::kF32, "rstd_TN", where);
  check_tensor(ex, weights.q_d, {s.head_dim}, qkv_TH.dtype, "q_d", where);
  check_tensor(ex, weights.k_d, {s.head_dim}, qkv_TH.dtype, "k_d", where);
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

void rms_norm_backward(Exec& ex, TensorView dx_TD, GradientView dw_D, ConstTensorView dy_TD,
                       const NormedRows& rows, const NormWeight& weight, Accumulate mode) {
  const auto& [x_TD, rstd_T] = rows;
  const ConstTensorView& w_D = weight.w_D;
  check_scratch(ex);
  check_norm(ex, x_TD, w_D, rstd_T);
  check_tensor(ex, dy_TD, x_TD.shape, x_TD.dtype, "dy_TD");
  check_tensor(ex, dx_TD, x_TD.shape, x_TD.dtype, "dx_TD");
  check_float_or(dw_D, x_TD.dtype, "dw_D");
  check_tensor(ex, dw_D, w_D.shape, dw_D.dtype, "dw_D");
  const double dx_read = mode == Accumulate::kAdd ? bytes_of(dx_TD) : 0.0;
  ex.book(
      "rms_norm_backward", 11.0 * static_cast<double>(x_TD.elements()),
      bytes_of(dy_TD) + bytes_of(x_TD) + bytes_of(w_D) + bytes_of(rstd_T) + bytes_if_added(dw_D) + dx_read,
      bytes_of(dx_TD) + bytes_of(dw_D));
  dispatch(ex, &Backend::rms_norm_backward, dx_TD, dw_D, dy_TD, rows, weight, mode);
}

void qk_norm_forward(Exec& ex, TensorView qkv_TH, TensorView x_TP, TensorView rstd_TN,
                     const QkWeights& weights, AttentionShape shape) {
  check_heads(ex, qkv_TH, x_TP, rstd_TN, weights, shape);
  ex.book("qk_norm_forward", 4.0 * static_cast<double>(x_TP.elements()),
          bytes_of(x_TP) + bytes_of(weights.q_d) + bytes_of(weights.k_d),
          2 * bytes_of(x_TP) + bytes_of(rstd_TN));
  dispatch(ex, &Backend::qk_norm_forward, qkv_TH, x_TP, rstd_TN, weights, shape);
}

void qk_norm_backward(Exec& ex, TensorView dqkv_TH, const QkWeightGradients& dw, ConstTensorView x_TP,
                      ConstTensorView rstd_TN, const QkWeights& weights, AttentionShape shape) {
  check_scratch(ex);
  check_heads(ex, dqkv_TH, x_TP, rstd_TN, weights, shape);
  for (const GradientView& d : {dw.q_d, dw.k_d}) {
    check_float_or(d, dqkv_TH.dtype, "dw");
    check_tensor(ex, d, weights.q_d.shape, d.dtype, "dw");
  }
  ex.book("qk_norm_backward", 11.0 * static_cast<double>(x_TP.elements()),
          2 * bytes_of(x_TP) + bytes_of(rstd_TN) + bytes_of(weights.q_d) + bytes_of(weights.k_d) +
              bytes_if_added(dw.q_d) + bytes_if_added(dw.k_d),
          bytes_of(x_TP) + bytes_of(dw.q_d) + bytes_of(dw.k_d));
  dispatch(ex, &Backend::qk_norm_backward, dqkv_TH, dw, x_TP, rstd_TN, weights, shape);
}

}  // namespace upmoe::ops
