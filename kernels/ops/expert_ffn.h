#pragma once
// The routed experts' feed-forward over rows that lie expert by expert:
//   x = rows picked out of others,  gate_up = x w_gate_up^T,  h = weight * SwiGLU(gate_up),  y = h w_down^T.
// The routing weight multiplies the hidden row, before the down projection: the same product, and its gradient
// needs only what gate_up gives.
//
// Where adapters stand beside the weights, what they add belongs to the products: gate_up and y, dh and dx.
//
// One call for forward, for the gradient of the rows and for that of the weights. ExpertFfn::fused chooses behind them:
// gathers, grouped products and SwiGLU one after the other (any device and dtype), or the ops of experts.h, to which
// the picked rows and gate_up are all that forward need keep:
//
//   one after the other   gather | product | SwiGLU | product        kept x_RD, gate_up_RG, h_RF, each or made again
//   fused                 experts_up                | experts_rows   kept gate_up_RG

#include "kernels/ops/experts.h"

namespace upmoe::ops {

struct ExpertActivations {
  TensorView x_RD, gate_up_RG, h_RF;
};
// Writes y_RD, and of `kept` what is given (fused: gate_up_RG alone).
void expert_ffn_forward(Exec& ex, TensorView y_RD, const ExpertActivations& kept, const PickedRows& x,
                        const ExpertFfn& f);

struct ExpertGradients {
  TensorView dx_RD, dweight_R;  // what the rows' senders want
  TensorView dgate_up_RG;       // what the weights' gradients are made of
  TensorView dy_RD;             // one after the other alone
  TensorView h_RF;              // fused alone
  // Of each adapter there is, its low-rank rows' gradient.
  TensorView dz_gate_up_RL = {}, dz_down_RL = {};
};
// Overwrites all of `g`.
void expert_ffn_backward(Exec& ex, const ExpertGradients& g, const PickedRows& dy, ConstTensorView gate_up_RG,
                         const ExpertFfn& f);
// What the products of the weights' gradients are taken of. One after the other: x_RD, dy_RD and hidden rows, or
// gate_up_RG where they are made again. Fused: the rows before they are picked, and h_RF as backward wrote it.
struct WeightOperands {
  PickedRows x, dy;
  ConstTensorView dgate_up_RG, h_RF, gate_up_RG;
  ConstTensorView dz_gate_up_RL = {}, dz_down_RL = {};
};
// (+)= , each where it is given. Overwritten, experts without rows get zeros.
void expert_ffn_wgrad(Exec& ex, GradientView dgate_up_eGD, GradientView ddown_eDF, const WeightOperands& o,
                      const ExpertFfn& f);
// The same of the adapters that f has, one after the other alone.
void expert_adapters_wgrad(Exec& ex, const LowRankGradient& dgate_up, const LowRankGradient& ddown,
                           const WeightOperands& o, const ExpertFfn& f);

}  // namespace upmoe::ops
