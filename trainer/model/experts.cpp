#include "trainer/model/experts.h"

#include "kernels/ops/grouped_gemm.h"
#include "kernels/ops/routing.h"

namespace upmoe {

namespace {

ops::ExpertShape shape_of(const Param& gate_up_eGD) {
  const Shape& s = gate_up_eGD.value.shape;
  return {.experts = s[0],
          .width = s[2],
          .neurons = s[1] / 2,
          .dtype = gate_up_eGD.value.dtype,
          .gradient = gate_up_eGD.grad.given() ? gate_up_eGD.grad.dtype : gate_up_eGD.value.dtype};
}

LowRank factors_of(Exec& ex, const std::optional<Adapter>& adapter) {
  return adapter ? adapter->factors(ex) : LowRank{};
}

}  // namespace

bool Experts::fuses(const Exec& ex) const {
  return !gate_up_adapter && !down_adapter && ops::fuses_experts(ex, shape_of(gate_up_eGD));
}

ops::ExpertFfn Experts::ffn(const Saved& saved, const LowRank& gate_up, const LowRank& down) const {
  return {.gate_up_eGD = gate_up_eGD.value,
          .down_eDF = down_eDF.value,
          .weight_R = saved.weight_R1.reshape({saved.weight_R1.rows()}),
          .rows = saved.experts(),
          .fused = saved.fused,
          .gate_up_adapter = gate_up,
          .down_adapter = down};
}

void Experts::forward(Exec& ex, TensorView y_RD, const Rows& rows, Arena& keep, Saved& saved) const {
  const std::int64_t R = y_RD.rows(), G = gate_up_eGD.value.shape[1];
  saved.weight_R1 = rows.weight_R1;
  saved.offset_e1 = rows.experts.offset_e1;
  saved.offsets.assign(rows.experts.on_host.begin(), rows.experts.on_host.end());
  saved.fused = fuses(ex);
  saved.x = rows.x;
  UPMOE_CHECK(!saved.fused || rows.lasting, "fused, backward picks its rows again");
  // Fused, the rows are picked where they are used, and hidden rows are an output of backward.
  if (wants_rows() && (!rows.lasting || (keeps.rows && !saved.fused))) {
    saved.kept.x_RD = keep.take(y_RD.shape, y_RD.dtype, "expert input");
    saved.x = {saved.kept.x_RD, {}};
  }
  if (keeps.gate_up) saved.kept.gate_up_RG = keep.take({R, G}, y_RD.dtype, "expert gate and up");
  if (keeps.hidden && wants_hidden() && !saved.fused)
    saved.kept.h_RF = keep.take({R, G / 2}, y_RD.dtype, "expert hidden");
  ScratchScope scope(*ex.scratch);
  const LowRank gate_up = factors_of(ex, gate_up_adapter), down = factors_of(ex, down_adapter);
  ops::expert_ffn_forward(ex, y_RD, saved.kept, rows.x, ffn(saved, gate_up, down));
}

void Experts::make_again(Exec& ex, Backward& b, const Saved& saved) const {
  const DType dtype = gate_up_eGD.value.dtype;
  const std::int64_t R = saved.weight_R1.rows(), G = gate_up_eGD.value.shape[1],
                     D = gate_up_eGD.value.shape[2];
  Exec again = not_booked(ex);
  if (wants_rows() && !saved.fused && !b.activations.x_RD.given()) {
    b.activations.x_RD = ex.scratch->take({R, D}, dtype, "expert input, again");
    ops::gather_rows(again, b.activations.x_RD, saved.x.from_XD, saved.x.index_R, saved.x.divisor);
  }
  if (b.activations.gate_up_RG.given()) return;
  b.activations.gate_up_RG = ex.scratch->take({R, G}, dtype, "expert gate and up, again");
  if (saved.fused) {
    // Its hidden rows are written once more by backward.
    ops::experts_up(again, b.activations.gate_up_RG, b.gradients.h_RF, saved.x, ffn(saved, {}, {}));
  } else {
    ops::grouped_gemm_forward(again, b.activations.gate_up_RG, b.activations.x_RD, gate_up_eGD.value,
                              saved.experts());
    ops::add_low_rank(again, b.activations.gate_up_RG, b.activations.x_RD, b.gate_up_adapter,
                      saved.experts());
  }
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
                           .dgate_up_RG = take({R, G}, dtype, "expert gate and up gradient"),
                           .dy_RD = {},
                           .h_RF = {},
                           .dz_gate_up_RL = {},
                           .dz_down_RL = {}},
             .dy = {}};
  if (saved.fused) {
    b.gradients.h_RF = take({R, G / 2}, dtype, "expert hidden");
  } else {
    b.gradients.dy_RD = take({R, D}, dtype, "expert output gradient");
  }
  Exec again = not_booked(ex);
  b.gate_up_adapter = factors_of(again, gate_up_adapter);
  b.down_adapter = factors_of(again, down_adapter);
  if (b.gate_up_adapter.given())
    b.gradients.dz_gate_up_RL = take({R, b.gate_up_adapter.rank()}, dtype, "low-rank rows' gradient");
  if (b.down_adapter.given())
    b.gradients.dz_down_RL = take({R, b.down_adapter.rank()}, dtype, "low-rank rows' gradient");
  make_again(ex, b, saved);
  return b;
}

void Experts::backward_rows(Exec& ex, Backward& b, const ops::PickedRows& dy, const Saved& saved) const {
  b.dy = dy;
  ops::expert_ffn_backward(ex, b.gradients, dy, b.activations.gate_up_RG,
                           ffn(saved, b.gate_up_adapter, b.down_adapter));
}

void Experts::backward_weights(Exec& ex, const Backward& b, const Saved& saved) const {
  const ops::WeightOperands operands{.x = saved.fused ? saved.x : ops::PickedRows{b.activations.x_RD, {}},
                                     .dy = saved.fused ? b.dy : ops::PickedRows{b.gradients.dy_RD, {}},
                                     .dgate_up_RG = b.gradients.dgate_up_RG,
                                     .h_RF = saved.fused ? b.gradients.h_RF : b.activations.h_RF,
                                     .gate_up_RG = b.activations.gate_up_RG,
                                     .dz_gate_up_RL = b.gradients.dz_gate_up_RL,
                                     .dz_down_RL = b.gradients.dz_down_RL};
  const ops::ExpertFfn f = ffn(saved, b.gate_up_adapter, b.down_adapter);
  ops::expert_ffn_wgrad(ex, gate_up_eGD.write_grad(), down_eDF.write_grad(), operands, f);
  backward_adapters(ex, operands, f);
}

void Experts::backward_adapters(Exec& ex, const ops::WeightOperands& operands,
                                const ops::ExpertFfn& f) const {
  // Both train or neither: they are of one model.
  if (!wants_grad(gate_up_adapter) && !wants_grad(down_adapter)) return;
  ScratchScope scope(*ex.scratch);
  const auto gradients_of = [&](const std::optional<Adapter>& adapter) {
    return adapter ? adapter->gradients(ex) : LowRankGradient{};
  };
  const LowRankGradient dgate_up = gradients_of(gate_up_adapter), ddown = gradients_of(down_adapter);
  ops::expert_adapters_wgrad(ex, dgate_up, ddown, operands, f);
  if (gate_up_adapter) gate_up_adapter->share_gradients(ex, dgate_up);
  if (down_adapter) down_adapter->share_gradients(ex, ddown);
}

}  // namespace upmoe
