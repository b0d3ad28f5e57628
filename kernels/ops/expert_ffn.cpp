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
  UPMOE_CHECK(!kept.x_RD.given() && !kept.h_RF.given(), "fused, picked and hidden rows are not kept");
  const std::int64_t R = y_RD.rows(), G = f.gate_up_eGD.shape[1];
  ScratchScope scope(*ex.scratch);
  const TensorView gate_up_RG = memory_for(ex, kept.gate_up_RG, {R, G}, y_RD.dtype, "expert gate and up"),
                   h_RF = ex.scratch->take({R, G / 2}, y_RD.dtype, "expert hidden");
  experts_up(ex, gate_up_RG, h_RF, x, f);
  experts_rows(ex, y_RD, h_RF, f.down_eDF, Transpose::kYes, f.rows);
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
  swiglu_forward(ex, h_RF, gate_up_RG, f.weight_R);
  grouped_gemm_forward(ex, y_RD, h_RF, f.down_eDF, f.rows);
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
  swiglu_backward(ex, g.dgate_up_RG, g.dweight_R, dh_RF, gate_up_RG, f.weight_R);
  grouped_gemm_dgrad(ex, g.dx_RD, g.dgate_up_RG, f.gate_up_eGD, f.rows);
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
  if (ddown_eDF.given()) {
    ConstTensorView h_RF = o.h_RF;
    if (!h_RF.given()) {
      const TensorView again_RF = ex.scratch->take({o.gate_up_RG.rows(), o.gate_up_RG.shape[1] / 2},
                                                   o.gate_up_RG.dtype, "expert hidden, again");
      Exec again = not_booked(ex);
      swiglu_forward(again, again_RF, o.gate_up_RG, f.weight_R);
      h_RF = again_RF;
    }
    grouped_gemm_wgrad(ex, ddown_eDF, o.dy.from_XD, h_RF, f.rows, ddown_eDF.mode);
  }
  if (dgate_up_eGD.given())
    grouped_gemm_wgrad(ex, dgate_up_eGD, o.dgate_up_RG, o.x.from_XD, f.rows, dgate_up_eGD.mode);
}

}  // namespace upmoe::ops
