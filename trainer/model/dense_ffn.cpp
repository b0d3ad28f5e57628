#include "trainer/model/dense_ffn.h"

#include "kernels/ops/activation.h"

namespace upmoe {

void DenseFfn::forward(Exec& ex, TensorView y_tD, ConstTensorView x_tD, Arena& keep, Saved& saved) const {
  const std::int64_t T = x_tD.rows() * tp->size(), G = gate_up.weight_NK.value.shape[0];
  saved.x_tD = x_tD;
  const bool keeps_hidden = keeps.hidden && down.wants_input();
  if (keeps_hidden) saved.h_TF = keep.take({T, G / 2}, x_tD.dtype, "ffn hidden");
  if (gate_1D) saved.gate_T = keep.take({T}, DType::kF32, "shared expert gate");
  if (keeps.gate_up) saved.gate_up_TG = keep.take({T, G}, x_tD.dtype, "ffn gate and up");
  ScratchScope scope(*ex.scratch);
  const TensorView gate_up_TG =
      keeps.gate_up ? saved.gate_up_TG : ex.scratch->take({T, G}, x_tD.dtype, "ffn gate and up");
  const ConstTensorView x_TD = gather_tokens(ex, *tp, x_tD);
  gate_up.forward(ex, gate_up_TG, x_TD);
  if (gate_1D) {
    Exec once = booked_once(ex);
    ops::sigmoid_gate_forward(once, saved.gate_T, x_TD, gate_1D->value);
  }
  const TensorView h_TF = keeps_hidden ? saved.h_TF : ex.scratch->take({T, G / 2}, x_tD.dtype, "ffn hidden");
  hidden(ex, h_TF, gate_up_TG, saved);
  PartialSum y(ex, *tp, y_tD);
  down.forward(ex, y.partial_TD(), h_TF);
  y.reduce(ex);
}

// Every rank of tp multiplies all tokens by the gate: the model's work is that of one of them.
Exec DenseFfn::booked_once(const Exec& ex) const {
  return tp->rank() == 0 ? ex : not_booked(ex);
}

void DenseFfn::hidden(Exec& ex, TensorView h_TF, ConstTensorView gate_up_TG, const Saved& saved) const {
  const auto forward = activation == Activation::kSilu ? ops::swiglu_forward : ops::geglu_forward;
  forward(ex, h_TF, gate_up_TG, saved.gate_T);  // absent without a gate
}

// dx_TD += , where it is given, and the gate's weight gradient (+)= , from dgate_T.
void DenseFfn::gate_backward(Exec& ex, TensorView dx_TD, ConstTensorView dgate_T, ConstTensorView x_TD,
                             const Saved& saved) const {
  const GradientView dw_1D = gradient_or_scratch(ex, *gate_1D, "unwanted gate gradient");
  Exec once = booked_once(ex);
  ops::sigmoid_gate_backward(once, dx_TD, dw_1D, dgate_T, saved.gate_T, x_TD, gate_1D->value);
}

void DenseFfn::backward(Exec& ex, TensorView dx_tD, ConstTensorView dy_tD, const Saved& saved,
                        GateGradient* left) const {
  TensorView dgate_T;
  if (gate_1D) dgate_T = ex.scratch->take(saved.gate_T.shape, DType::kF32, "shared expert gate gradient");
  ScratchScope scope(*ex.scratch);
  GatheredTokens dy(ex, *tp, dy_tD);
  // For the weights' gradients, and to make gate and up again: frozen weights have no use for the tokens.
  std::optional<GatheredTokens> x;
  if (gate_up.wants_input() || gate_1D || !keeps.gate_up) x.emplace(ex, *tp, saved.x_tD);
  Exec again = not_booked(ex);
  const std::int64_t T = saved.x_tD.rows() * tp->size(), G = gate_up.weight_NK.value.shape[0];
  ConstTensorView x_TD;
  TensorView gate_up_TG = saved.gate_up_TG, h_TF = saved.h_TF;
  if (!keeps.gate_up) {
    gate_up_TG = ex.scratch->take({T, G}, dy_tD.dtype, "ffn gate and up, again");
    x_TD = x->finish();
    gate_up.forward(again, gate_up_TG, x_TD);
  }
  TensorView dh_TF = ex.scratch->take({T, G / 2}, dy_tD.dtype, "ffn hidden gradient");
  if (!keeps.hidden && down.wants_input()) {
    h_TF = ex.scratch->take({T, G / 2}, dy_tD.dtype, "ffn hidden, again");
    hidden(again, h_TF, gate_up_TG, saved);
  }
  TensorView dgate_up_TG = ex.scratch->take({T, G}, dy_tD.dtype, "ffn gate and up gradient");
  down.backward(ex, dh_TF, Accumulate::kOverwrite, dy.finish(), h_TF);
  const auto activation_backward =
      activation == Activation::kSilu ? ops::swiglu_backward : ops::geglu_backward;
  activation_backward(ex, dgate_up_TG, dgate_T, dh_TF, gate_up_TG, saved.gate_T);
  if (keeps.gate_up && x) x_TD = x->finish();
  PartialSum dx(ex, *tp, dx_tD);
  gate_up.backward(ex, dx.partial_TD(), Accumulate::kOverwrite, dgate_up_TG, x_TD);
  const bool leaves = gate_1D && left != nullptr && tp->size() == 1;
  if (leaves) *left = {dgate_T, saved.gate_T, gate_1D->value};
  if (gate_1D) gate_backward(ex, leaves ? TensorView{} : dx.partial_TD(), dgate_T, x_TD, saved);
  dx.reduce(ex);
}

}  // namespace upmoe
