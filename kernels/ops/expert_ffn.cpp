#include "kernels/ops/expert_ffn.h"

#include "kernels/ops/activation.h"
#include "kernels/ops/grouped_gemm.h"
#include "kernels/ops/routing.h"

namespace upmoe::ops {

namespace {

void pick(Exec& ex, TensorView out_RD, const PickedRows& rows) {
  gather_rows(ex, out_RD, rows.from_XD, rows.index_R, rows.divisor);
}

}  // namespace

void expert_ffn_forward(Exec& ex, TensorView y_RD, const ExpertActivations& kept, const PickedRows& x,
                        const ExpertFfn& f) {
  const std::int64_t R = y_RD.rows(), G = f.gate_up_eGD.shape[1];
  ScratchScope scope(*ex.scratch);
  const auto memory = [&](const TensorView& there, Shape shape, const char* what) {
    return there.given() ? there : ex.scratch->take(shape, y_RD.dtype, what);
  };
  const TensorView x_RD = memory(kept.x_RD, y_RD.shape, "expert input"),
                   gate_up_RG = memory(kept.gate_up_RG, {R, G}, "expert gate and up"),
                   h_RF = memory(kept.h_RF, {R, G / 2}, "expert hidden");
  pick(ex, x_RD, x);
  grouped_gemm_forward(ex, gate_up_RG, x_RD, f.gate_up_eGD, f.rows);
  swiglu_forward(ex, h_RF, gate_up_RG, f.weight_R);
  grouped_gemm_forward(ex, y_RD, h_RF, f.down_eDF, f.rows);
}

void expert_ffn_backward(Exec& ex, const ExpertGradients& g, const PickedRows& dy, ConstTensorView gate_up_RG,
                         const ExpertFfn& f) {
  pick(ex, g.dy_RD, dy);
  ScratchScope scope(*ex.scratch);
  const TensorView dh_RF =
      ex.scratch->take({gate_up_RG.rows(), gate_up_RG.shape[1] / 2}, g.dy_RD.dtype, "expert hidden gradient");
  grouped_gemm_dgrad(ex, dh_RF, g.dy_RD, f.down_eDF, f.rows);
  swiglu_backward(ex, g.dgate_up_RG, g.dweight_R, dh_RF, gate_up_RG, f.weight_R);
  grouped_gemm_dgrad(ex, g.dx_RD, g.dgate_up_RG, f.gate_up_eGD, f.rows);
}

void expert_ffn_wgrad(Exec& ex, TensorView dgate_up_eGD, TensorView ddown_eDF, const ExpertActivations& a,
                      const ExpertGradients& g, const ExpertFfn& f) {
  ScratchScope scope(*ex.scratch);
  if (ddown_eDF.given()) {
    TensorView h_RF = a.h_RF;
    if (!h_RF.given()) {
      h_RF = ex.scratch->take({a.gate_up_RG.rows(), a.gate_up_RG.shape[1] / 2}, a.gate_up_RG.dtype,
                              "expert hidden, again");
      Exec again = not_booked(ex);
      swiglu_forward(again, h_RF, a.gate_up_RG, f.weight_R);
    }
    grouped_gemm_wgrad(ex, ddown_eDF, g.dy_RD, h_RF, f.rows, Accumulate::kAdd);
  }
  if (dgate_up_eGD.given())
    grouped_gemm_wgrad(ex, dgate_up_eGD, g.dgate_up_RG, a.x_RD, f.rows, Accumulate::kAdd);
}

}  // namespace upmoe::ops
