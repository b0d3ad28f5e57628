#include "kernels/ops/expert_ffn.h"

#include "kernels/ops/activation.h"
#include "kernels/ops/grouped_gemm.h"
#include "kernels/ops/routing.h"

namespace upmoe::ops {

namespace {

void pick(Exec& ex, TensorView out_RD, const PickedRows& rows) {
  gather_rows(ex, out_RD, rows.from_XD, rows.index_R, rows.divisor);
}

TensorView memory_for(Exec& ex, const TensorView& there, Shape shape, DType dtype, const char* what) {
  return there.given() ? there : ex.scratch->take(shape, dtype, what);
}

void forward_fused(Exec& ex, TensorView y_RD, const ExpertActivations& kept, const PickedRows& x,
                   const ExpertFfn& f) {
  UPMOE_CHECK(!f.gate_up_adapter.given() && !f.down_adapter.given(), "fused, experts have no adapters");
  UPMOE_CHECK(!kept.x_RD.given() && !kept.h_RF.given(), "fused, picked and hidden rows are not kept");
  const std::int64_t R = y_RD.rows(), G = f.gate_up_eGD.shape[1];
  ScratchScope scope(*ex.scratch);
  const TensorView gate_up_RG = memory_for(ex, kept.gate_up_RG, {R, G}, y_RD.dtype, "expert gate and up"),
                   h_RF = ex.scratch->take({R, G / 2}, y_RD.dtype, "expert hidden");
  experts_up(ex, gate_up_RG, h_RF, x, f);
  experts_rows(ex, y_RD, h_RF, f.down_eDF, Transpose::kYes, f.rows);
}

// As they were kept, or made again in temporary memory of the caller's ScratchScope.
ConstTensorView hidden_rows(Exec& ex, const WeightOperands& o, const ExpertFfn& f) {
  if (o.h_RF.given()) return o.h_RF;
  const TensorView again_RF = ex.scratch->take({o.gate_up_RG.rows(), o.gate_up_RG.shape[1] / 2},
                                               o.gate_up_RG.dtype, "expert hidden, again");
  Exec again = not_booked(ex);
  swiglu_forward(again, again_RF, o.gate_up_RG, f.weight_R);
  return again_RF;
}

}  // namespace

void expert_ffn_forward(Exec& ex, TensorView y_RD, const ExpertActivations& kept, const PickedRows& x,
                        const ExpertFfn& f) {
  if (f.fused) return forward_fused(ex, y_RD, kept, x, f);
  const std::int64_t R = y_RD.rows(), G = f.gate_up_eGD.shape[1];
  ScratchScope scope(*ex.scratch);
  const TensorView x_RD = memory_for(ex, kept.x_RD, y_RD.shape, y_RD.dtype, "expert input"),
                   gate_up_RG = memory_for(ex, kept.gate_up_RG, {R, G}, y_RD.dtype, "expert gate and up"),
                   h_RF = memory_for(ex, kept.h_RF, {R, G / 2}, y_RD.dtype, "expert hidden");
  pick(ex, x_RD, x);
  grouped_gemm_forward(ex, gate_up_RG, x_RD, f.gate_up_eGD, f.rows);
  add_low_rank(ex, gate_up_RG, x_RD, f.gate_up_adapter, f.rows);
  swiglu_forward(ex, h_RF, gate_up_RG, f.weight_R);
  grouped_gemm_forward(ex, y_RD, h_RF, f.down_eDF, f.rows);
  add_low_rank(ex, y_RD, h_RF, f.down_adapter, f.rows);
}

void expert_ffn_backward(Exec& ex, const ExpertGradients& g, const PickedRows& dy, ConstTensorView gate_up_RG,
                         const ExpertFfn& f) {
  if (f.fused) {
    experts_dhidden(ex, {g.dgate_up_RG, g.h_RF, g.dweight_R}, dy, gate_up_RG, f);
    return experts_rows(ex, g.dx_RD, g.dgate_up_RG, f.gate_up_eGD, Transpose::kNo, f.rows);
  }
  pick(ex, g.dy_RD, dy);
  ScratchScope scope(*ex.scratch);
  const TensorView dh_RF =
      ex.scratch->take({gate_up_RG.rows(), gate_up_RG.shape[1] / 2}, g.dy_RD.dtype, "expert hidden gradient");
  grouped_gemm_dgrad(ex, dh_RF, g.dy_RD, f.down_eDF, f.rows);
  low_rank_dgrad(ex, dh_RF, g.dz_down_RL, g.dy_RD, f.down_adapter, f.rows);
  swiglu_backward(ex, g.dgate_up_RG, g.dweight_R, dh_RF, gate_up_RG, f.weight_R);
  grouped_gemm_dgrad(ex, g.dx_RD, g.dgate_up_RG, f.gate_up_eGD, f.rows);
  low_rank_dgrad(ex, g.dx_RD, g.dz_gate_up_RL, g.dgate_up_RG, f.gate_up_adapter, f.rows);
}

void expert_ffn_wgrad(Exec& ex, GradientView dgate_up_eGD, GradientView ddown_eDF, const WeightOperands& o,
                      const ExpertFfn& f) {
  if (f.fused) {
    if (ddown_eDF.given()) experts_wgrad(ex, ddown_eDF, o.dy, {o.h_RF, {}}, f.rows, ddown_eDF.mode);
    if (dgate_up_eGD.given())
      experts_wgrad(ex, dgate_up_eGD, {o.dgate_up_RG, {}}, o.x, f.rows, dgate_up_eGD.mode);
    return;
  }
  ScratchScope scope(*ex.scratch);
  if (ddown_eDF.given())
    grouped_gemm_wgrad(ex, ddown_eDF, o.dy.from_XD, hidden_rows(ex, o, f), f.rows, ddown_eDF.mode);
  if (dgate_up_eGD.given())
    grouped_gemm_wgrad(ex, dgate_up_eGD, o.dgate_up_RG, o.x.from_XD, f.rows, dgate_up_eGD.mode);
}

void expert_adapters_wgrad(Exec& ex, const LowRankGradient& dgate_up, const LowRankGradient& ddown,
                           const WeightOperands& o, const ExpertFfn& f) {
  ScratchScope scope(*ex.scratch);
  if (f.down_adapter.given())
    low_rank_wgrad(ex, ddown, {o.dy.from_XD, o.dz_down_RL, hidden_rows(ex, o, f)}, f.down_adapter, f.rows);
  low_rank_wgrad(ex, dgate_up, {o.dgate_up_RG, o.dz_gate_up_RL, o.x.from_XD}, f.gate_up_adapter, f.rows);
}

}  // namespace upmoe::ops
