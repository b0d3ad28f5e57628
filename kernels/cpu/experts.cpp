// Step by step: on a processor a step's rows are in the cache when the next one takes them.

#include "kernels/ops/experts.h"

#include "kernels/ops/backend.h"

namespace upmoe::cpu {

namespace {

ConstTensorView picked(Exec& ex, const ops::PickedRows& rows) {
  if (!rows.index_R.given()) return rows.from_XD;
  const TensorView out_RD =
      ex.scratch->take({rows.index_R.elements(), rows.from_XD.shape[1]}, rows.from_XD.dtype, "picked rows");
  gather_rows(ex, out_RD, rows.from_XD, rows.index_R, rows.divisor);
  return out_RD;
}

}  // namespace

bool fuses_experts(const Exec&, const ops::ExpertShape&) {
  return false;
}

void experts_up(Exec& ex, TensorView gate_up_RG, TensorView h_RF, const ops::PickedRows& x,
                const ops::ExpertFfn& f) {
  ScratchScope scope(*ex.scratch);
  grouped_gemm_forward(ex, gate_up_RG, picked(ex, x), f.gate_up_eGD, f.rows);
  swiglu_forward(ex, h_RF, gate_up_RG, f.weight_R);
}

void experts_rows(Exec& ex, TensorView out_RN, ConstTensorView in_RK, ConstTensorView w,
                  Transpose transpose_w, const ExpertRows& rows) {
  if (transpose_w == Transpose::kYes) return grouped_gemm_forward(ex, out_RN, in_RK, w, rows);
  grouped_gemm_dgrad(ex, out_RN, in_RK, w, rows);
}

void experts_dhidden(Exec& ex, const ops::HiddenGradients& g, const ops::PickedRows& dy,
                     ConstTensorView gate_up_RG, const ops::ExpertFfn& f) {
  ScratchScope scope(*ex.scratch);
  const TensorView dh_RF = ex.scratch->take(g.h_RF.shape, g.h_RF.dtype, "expert hidden gradient");
  grouped_gemm_dgrad(ex, dh_RF, picked(ex, dy), f.down_eDF, f.rows);
  swiglu_backward(ex, g.dgate_up_RG, g.dweight_R, dh_RF, gate_up_RG, f.weight_R);
  swiglu_forward(ex, g.h_RF, gate_up_RG, f.weight_R);
}

void experts_wgrad(Exec& ex, TensorView dw_eNK, const ops::PickedRows& dy, const ops::PickedRows& x,
                   const ExpertRows& rows, Accumulate mode) {
  ScratchScope scope(*ex.scratch);
  grouped_gemm_wgrad(ex, dw_eNK, picked(ex, dy), picked(ex, x), rows, mode);
}

}  // namespace upmoe::cpu
