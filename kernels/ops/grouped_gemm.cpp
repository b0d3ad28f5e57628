#include "kernels/ops/grouped_gemm.h"

#include "kernels/ops/check_tensor.h"
#include "kernels/ops/dispatch.h"

namespace upmoe::ops {

namespace {

// wide_RN belongs to the output side of the Linear weights w_eNK, narrow_RK to the input side; `output` is
// the one of the three that the op writes.
void check_grouped(const Exec& ex, const ConstTensorView& wide_RN, const ConstTensorView& narrow_RK,
                   const ConstTensorView& w_eNK, const ConstTensorView& output, const ConstTensorView& input,
                   const ExpertRows& rows, std::source_location where = std::source_location::current()) {
  check_scratch(ex, where);
  check_float(input, "input", where);
  check_float_or(output, input.dtype, "output", where);
  if (w_eNK.shape.rank != 3 || narrow_RK.shape.rank != 2)
    fail_check("weights are [e, N, K], rows [R, K]", where,
               fmt::format("{} and {}", w_eNK.shape.str(), narrow_RK.shape.str()));
  const std::int64_t total = narrow_RK.shape[0];
  const auto dtype_of = [&](const ConstTensorView& t) { return &t == &output ? output.dtype : input.dtype; };
  check_tensor(ex, w_eNK, w_eNK.shape, dtype_of(w_eNK), "w_eNK", where);
  check_tensor(ex, wide_RN, {total, w_eNK.shape[1]}, dtype_of(wide_RN), "the [R, N] tensor", where);
  check_tensor(ex, narrow_RK, {total, w_eNK.shape[2]}, dtype_of(narrow_RK), "the [R, K] tensor", where);
  check_expert_rows(ex, rows, w_eNK.shape[0], total, where);
}

double flops_of(const ConstTensorView& rows_RK, const ConstTensorView& w_eNK) {
  return 2.0 * static_cast<double>(rows_RK.shape[0]) * static_cast<double>(w_eNK.shape[1]) *
         static_cast<double>(w_eNK.shape[2]);
}

}  // namespace

void grouped_gemm_forward(Exec& ex, TensorView y_RN, ConstTensorView x_RK, ConstTensorView w_eNK,
                          const ExpertRows& rows) {
  const ConstTensorView y = y_RN;
  check_grouped(ex, y, x_RK, w_eNK, y, x_RK, rows);
  ex.book("grouped_gemm_forward", flops_of(x_RK, w_eNK), bytes_of(x_RK) + expert_weight_bytes(w_eNK, rows),
          bytes_of(y_RN), Work::kGroupedProducts);
  dispatch(ex, &Backend::grouped_gemm_forward, y_RN, x_RK, w_eNK, rows);
}

void grouped_gemm_dgrad(Exec& ex, TensorView dx_RK, ConstTensorView dy_RN, ConstTensorView w_eNK,
                        const ExpertRows& rows) {
  const ConstTensorView dx = dx_RK;
  check_grouped(ex, dy_RN, dx, w_eNK, dx, dy_RN, rows);
  ex.book("grouped_gemm_dgrad", flops_of(dx, w_eNK), bytes_of(dy_RN) + expert_weight_bytes(w_eNK, rows),
          bytes_of(dx_RK), Work::kGroupedProducts);
  dispatch(ex, &Backend::grouped_gemm_dgrad, dx_RK, dy_RN, w_eNK, rows);
}

void grouped_gemm_wgrad(Exec& ex, TensorView dw_eNK, ConstTensorView dy_RN, ConstTensorView x_RK,
                        const ExpertRows& rows, Accumulate mode) {
  const ConstTensorView dw = dw_eNK;
  check_grouped(ex, dy_RN, x_RK, dw, dw, x_RK, rows);
  const bool add = mode == Accumulate::kAdd;
  const double touched = expert_weight_bytes(dw, rows);
  ex.book("grouped_gemm_wgrad", flops_of(x_RK, dw), bytes_of(dy_RN) + bytes_of(x_RK) + (add ? touched : 0.0),
          add ? touched : bytes_of(dw), Work::kGroupedProducts);
  dispatch(ex, &Backend::grouped_gemm_wgrad, dw_eNK, dy_RN, x_RK, rows, mode);
}

}  // namespace upmoe::ops
