#include "trainer/model/experts.h"

#include "kernels/ops/grouped_gemm.h"
#include "kernels/ops/routing.h"

namespace upmoe {

ops::ExpertFfn Experts::ffn(const Saved& saved) const {
  return {.gate_up_eGD = gate_up_eGD.value,
          .down_eDF = down_eDF.value,
          .weight_R = saved.weight_R1.reshape({saved.weight_R1.rows()}),
          .rows = saved.experts()};
}

void Experts::forward(Exec& ex, TensorView y_RD, const Rows& rows, Arena& keep, Saved& saved) const {
  const std::int64_t R = y_RD.rows(), G = gate_up_eGD.value.shape[1];
  saved.weight_R1 = rows.weight_R1;
  saved.offset_e1 = rows.experts.offset_e1;
  saved.offsets.assign(rows.experts.on_host.begin(), rows.experts.on_host.end());
  if (keeps.rows || !rows.lasting) {
    saved.kept.x_RD = keep.take(y_RD.shape, y_RD.dtype, "expert input");
  } else {
    saved.x = rows.x;
  }
  if (keeps.gate_up) saved.kept.gate_up_RG = keep.take({R, G}, y_RD.dtype, "expert gate and up");
  if (keeps.hidden) saved.kept.h_RF = keep.take({R, G / 2}, y_RD.dtype, "expert hidden");
  ops::expert_ffn_forward(ex, y_RD, saved.kept, rows.x, ffn(saved));
}

Experts::Backward Experts::begin_backward(Exec& ex, const Saved& saved) const {
  const DType dtype = gate_up_eGD.value.dtype;  // products take one dtype
  const std::int64_t R = saved.weight_R1.rows(), G = gate_up_eGD.value.shape[1],
                     D = gate_up_eGD.value.shape[2];
  const auto take = [&](Shape shape, DType type, const char* what) {
    return ex.scratch->take(shape, type, what);
  };
  Backward b{.activations = saved.kept,
             .gradients = {.dx_RD = take({R, D}, dtype, "expert input gradient"),
                           .dweight_R = take({R}, DType::kF32, "expert row weight gradient"),
                           .dy_RD = take({R, D}, dtype, "expert output gradient"),
                           .dgate_up_RG = take({R, G}, dtype, "expert gate and up gradient")}};
  Exec again = not_booked(ex);
  if (!b.activations.x_RD.given()) {
    b.activations.x_RD = take({R, D}, dtype, "expert input, again");
    ops::gather_rows(again, b.activations.x_RD, saved.x.from_XD, saved.x.index_R, saved.x.divisor);
  }
  if (!b.activations.gate_up_RG.given()) {
    b.activations.gate_up_RG = take({R, G}, dtype, "expert gate and up, again");
    ops::grouped_gemm_forward(again, b.activations.gate_up_RG, b.activations.x_RD, gate_up_eGD.value,
                              saved.experts());
  }
  return b;
}

void Experts::backward_rows(Exec& ex, const Backward& b, const ops::PickedRows& dy,
                            const Saved& saved) const {
  ops::expert_ffn_backward(ex, b.gradients, dy, b.activations.gate_up_RG, ffn(saved));
}

void Experts::backward_weights(Exec& ex, const Backward& b, const Saved& saved) const {
  ops::expert_ffn_wgrad(ex, gate_up_eGD.grad, down_eDF.grad, b.activations, b.gradients, ffn(saved));
}

}  // namespace upmoe
