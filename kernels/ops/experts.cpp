#include "kernels/ops/experts.h"

#include "kernels/ops/check_tensor.h"
#include "kernels/ops/dispatch.h"
#include "kernels/ops/grouped_gemm.h"

namespace upmoe::ops {

namespace {

using Where = std::source_location;

void check_picked(const Exec& ex, const PickedRows& p, std::int64_t rows, std::int64_t width, DType dtype,
                  Where where) {
  const std::int64_t from = p.from_XD.shape[0];
  if (p.from_XD.shape.rank != 2 || p.divisor < 1)
    fail_check("rows are [X, D]", where, fmt::format("{}, divisor {}", p.from_XD.shape.str(), p.divisor));
  check_tensor(ex, p.from_XD, {p.index_R.given() ? from : rows, width}, dtype, "from_XD", where);
  if (p.index_R.given()) check_tensor(ex, p.index_R, {rows}, DType::kI32, "index_R", where);
}

void check_ffn(const Exec& ex, const ExpertFfn& f, const ConstTensorView& gate_up_RG,
               const ConstTensorView& h_RF, Where where = Where::current()) {
  check_scratch(ex, where);
  check_float(h_RF, "h_RF", where);
  if (f.gate_up_eGD.shape.rank != 3 || h_RF.shape.rank != 2)
    fail_check("weights are [e, 2F, D], hidden rows [R, F]", where,
               fmt::format("{} and {}", f.gate_up_eGD.shape.str(), h_RF.shape.str()));
  const std::int64_t e = f.gate_up_eGD.shape[0], G = f.gate_up_eGD.shape[1], D = f.gate_up_eGD.shape[2],
                     R = h_RF.shape[0];
  if (G % 2 != 0) fail_check("gates and ups", where, f.gate_up_eGD.shape.str());
  check_tensor(ex, f.gate_up_eGD, {e, G, D}, h_RF.dtype, "gate_up_eGD", where);
  check_tensor(ex, f.down_eDF, {e, D, G / 2}, h_RF.dtype, "down_eDF", where);
  check_tensor(ex, f.weight_R, {R}, DType::kF32, "weight_R", where);
  check_tensor(ex, h_RF, {R, G / 2}, h_RF.dtype, "h_RF", where);
  check_tensor(ex, gate_up_RG, {R, G}, h_RF.dtype, "gate_up_RG", where);
  check_expert_rows(ex, f.rows, e, R, where);
}

double product_flops(std::int64_t rows, const ConstTensorView& w) {
  return 2.0 * static_cast<double>(rows) * static_cast<double>(w.shape[1]) * static_cast<double>(w.shape[2]);
}

double bytes_of_picked(const PickedRows& p, std::int64_t rows) {
  const double row = static_cast<double>(p.from_XD.shape[1]) * static_cast<double>(size_of(p.from_XD.dtype));
  return static_cast<double>(rows) * row + (p.index_R.given() ? bytes_of(p.index_R) : 0.0);
}

}  // namespace

bool fuses_experts(const Exec& ex, const ExpertShape& shape) {
  if (ex.device.type == DeviceType::kDry)
    return ex.experts == ExpertsPath::kFused && shape.experts > 0 && why_not_fused(shape).empty();
  return ex.device.type == DeviceType::kCuda && cuda::backend().fuses_experts(ex, shape);
}

void experts_up(Exec& ex, TensorView gate_up_RG, TensorView h_RF, const PickedRows& x, const ExpertFfn& f) {
  check_ffn(ex, f, gate_up_RG, h_RF);
  check_picked(ex, x, h_RF.shape[0], f.gate_up_eGD.shape[2], h_RF.dtype, Where::current());
  ex.book(
      "experts_up", product_flops(h_RF.shape[0], f.gate_up_eGD),
      bytes_of_picked(x, h_RF.shape[0]) + expert_weight_bytes(f.gate_up_eGD, f.rows) + bytes_of(f.weight_R),
      bytes_of(gate_up_RG) + bytes_of(h_RF), Work::kGroupedProducts);
  dispatch(ex, &Backend::experts_up, gate_up_RG, h_RF, x, f);
}

void experts_rows(Exec& ex, TensorView out_RN, ConstTensorView in_RK, ConstTensorView w,
                  Transpose transpose_w, const ExpertRows& rows) {
  check_scratch(ex);
  check_float(in_RK, "in_RK");
  UPMOE_CHECK(w.shape.rank == 3 && in_RK.shape.rank == 2, "w {}, in_RK {}", w.shape.str(), in_RK.shape.str());
  const bool forward = transpose_w == Transpose::kYes;
  check_tensor(ex, w, w.shape, in_RK.dtype, "w");
  check_tensor(ex, in_RK, {in_RK.shape[0], w.shape[forward ? 2 : 1]}, in_RK.dtype, "in_RK");
  check_tensor(ex, out_RN, {in_RK.shape[0], w.shape[forward ? 1 : 2]}, in_RK.dtype, "out_RN");
  check_expert_rows(ex, rows, w.shape[0], in_RK.shape[0], Where::current());
  ex.book("experts_rows", product_flops(in_RK.shape[0], w), bytes_of(in_RK) + expert_weight_bytes(w, rows),
          bytes_of(out_RN), Work::kGroupedProducts);
  dispatch(ex, &Backend::experts_rows, out_RN, in_RK, w, transpose_w, rows);
}

void experts_dhidden(Exec& ex, const HiddenGradients& g, const PickedRows& dy, ConstTensorView gate_up_RG,
                     const ExpertFfn& f) {
  check_ffn(ex, f, gate_up_RG, g.h_RF);
  check_picked(ex, dy, g.h_RF.shape[0], f.down_eDF.shape[1], g.h_RF.dtype, Where::current());
  check_tensor(ex, g.dgate_up_RG, gate_up_RG.shape, g.h_RF.dtype, "dgate_up_RG");
  check_tensor(ex, g.dweight_R, f.weight_R.shape, DType::kF32, "dweight_R");
  ex.book("experts_dhidden", product_flops(g.h_RF.shape[0], f.down_eDF),
          bytes_of_picked(dy, g.h_RF.shape[0]) + expert_weight_bytes(f.down_eDF, f.rows) +
              bytes_of(gate_up_RG) + bytes_of(f.weight_R),
          bytes_of(g.dgate_up_RG) + bytes_of(g.h_RF) + bytes_of(g.dweight_R), Work::kGroupedProducts);
  dispatch(ex, &Backend::experts_dhidden, g, dy, gate_up_RG, f);
}

void experts_wgrad(Exec& ex, TensorView dw_eNK, const PickedRows& dy, const PickedRows& x,
                   const ExpertRows& rows, Accumulate mode) {
  check_scratch(ex);
  UPMOE_CHECK(dw_eNK.shape.rank == 3, "dw_eNK {}", dw_eNK.shape.str());
  UPMOE_CHECK(!dy.index_R.given() || !x.index_R.given(), "dy and x are both picked");
  const ConstTensorView& rows_of_all = dy.index_R.given() ? x.from_XD : dy.from_XD;
  const std::int64_t R = rows_of_all.shape[0];
  check_float(rows_of_all, "dy or x");
  check_float_or(dw_eNK, rows_of_all.dtype, "dw_eNK");
  check_tensor(ex, dw_eNK, dw_eNK.shape, dw_eNK.dtype, "dw_eNK");
  check_picked(ex, dy, R, dw_eNK.shape[1], rows_of_all.dtype, Where::current());
  check_picked(ex, x, R, dw_eNK.shape[2], rows_of_all.dtype, Where::current());
  check_expert_rows(ex, rows, dw_eNK.shape[0], R, Where::current());
  const bool add = mode == Accumulate::kAdd;
  const double touched = expert_weight_bytes(dw_eNK, rows);
  ex.book("experts_wgrad", product_flops(R, dw_eNK),
          bytes_of_picked(dy, R) + bytes_of_picked(x, R) + (add ? touched : 0.0),
          add ? touched : bytes_of(dw_eNK), Work::kGroupedProducts);
  dispatch(ex, &Backend::experts_wgrad, dw_eNK, dy, x, rows, mode);
}

}  // namespace upmoe::ops
