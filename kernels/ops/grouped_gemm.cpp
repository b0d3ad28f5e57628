#include "kernels/ops/grouped_gemm.h"

#include <algorithm>

#include "kernels/ops/check_tensor.h"
#include "kernels/ops/dispatch.h"

namespace upmoe::ops {

namespace {

void check_rows(const Exec& ex, const ExpertRows& rows, std::int64_t experts, std::int64_t total,
                std::source_location where) {
  check_tensor(ex, rows.offset_e1, {experts + 1}, DType::kI32, "offset_e1", where);
  if (!rows.on_host.empty()) {
    if (static_cast<std::int64_t>(rows.on_host.size()) != experts + 1)
      fail_check("an offset for each expert, and R", where,
                 fmt::format("{} offsets for {} experts", rows.on_host.size(), experts));
    check_offsets(rows.on_host, total, where);
  }
  if (ex.device.type != DeviceType::kCpu) return;
  const std::span offset_e1(rows.offset_e1.as<std::int32_t>(), static_cast<std::size_t>(experts + 1));
  check_offsets(offset_e1, total, where);
  if (!rows.on_host.empty() && !std::ranges::equal(offset_e1, rows.on_host))
    fail_check("both copies of the offsets agree", where, fmt::format("{} experts", experts));
}

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
  check_rows(ex, rows, w_eNK.shape[0], total, where);
}

double flops_of(const ConstTensorView& rows_RK, const ConstTensorView& w_eNK) {
  return 2.0 * static_cast<double>(rows_RK.shape[0]) * static_cast<double>(w_eNK.shape[1]) *
         static_cast<double>(w_eNK.shape[2]);
}

// Of the weights only those of experts with rows are touched; all, for who does not know.
double weight_bytes(const ConstTensorView& w_eNK, const ExpertRows& rows) {
  std::int64_t experts = rows.on_host.empty() ? rows.experts() : 0;
  for (std::size_t i = 0; i + 1 < rows.on_host.size(); ++i)
    experts += rows.on_host[i] < rows.on_host[i + 1] ? 1 : 0;
  return static_cast<double>(experts) * static_cast<double>(w_eNK.shape[1]) *
         static_cast<double>(w_eNK.shape[2]) * static_cast<double>(size_of(w_eNK.dtype));
}

}  // namespace

void grouped_gemm_forward(Exec& ex, TensorView y_RN, ConstTensorView x_RK, ConstTensorView w_eNK,
                          const ExpertRows& rows) {
  const ConstTensorView y = y_RN;
  check_grouped(ex, y, x_RK, w_eNK, y, x_RK, rows);
  ex.book("grouped_gemm_forward", flops_of(x_RK, w_eNK), bytes_of(x_RK) + weight_bytes(w_eNK, rows),
          bytes_of(y_RN), Work::kModel);
  dispatch(ex, &Backend::grouped_gemm_forward, y_RN, x_RK, w_eNK, rows);
}

void grouped_gemm_dgrad(Exec& ex, TensorView dx_RK, ConstTensorView dy_RN, ConstTensorView w_eNK,
                        const ExpertRows& rows) {
  const ConstTensorView dx = dx_RK;
  check_grouped(ex, dy_RN, dx, w_eNK, dx, dy_RN, rows);
  ex.book("grouped_gemm_dgrad", flops_of(dx, w_eNK), bytes_of(dy_RN) + weight_bytes(w_eNK, rows),
          bytes_of(dx_RK), Work::kModel);
  dispatch(ex, &Backend::grouped_gemm_dgrad, dx_RK, dy_RN, w_eNK, rows);
}

void grouped_gemm_wgrad(Exec& ex, TensorView dw_eNK, ConstTensorView dy_RN, ConstTensorView x_RK,
                        const ExpertRows& rows, Accumulate mode) {
  const ConstTensorView dw = dw_eNK;
  check_grouped(ex, dy_RN, x_RK, dw, dw, x_RK, rows);
  const bool add = mode == Accumulate::kAdd;
  const double touched = weight_bytes(dw, rows);
  ex.book("grouped_gemm_wgrad", flops_of(x_RK, dw), bytes_of(dy_RN) + bytes_of(x_RK) + (add ? touched : 0.0),
          add ? touched : bytes_of(dw), Work::kModel);
  dispatch(ex, &Backend::grouped_gemm_wgrad, dw_eNK, dy_RN, x_RK, rows, mode);
}

}  // namespace upmoe::ops
