#pragma once
// The routed experts' feed-forward over rows that lie expert by expert:
//   x = rows picked out of others,  gate_up = x w_gate_up^T,  h = weight * SwiGLU(gate_up),  y = h w_down^T.
// The routing weight multiplies the hidden row, before the down projection: the same product, and its gradient
// needs only what gate_up gives.
//
// One call for forward, for the gradient of the rows and for that of the weights, so that what computes it can be
// chosen behind them: here gathers, grouped products and SwiGLU one after the other; a kernel that does several of
// these at once takes the same arguments.

#include "kernels/ops/expert_rows.h"

namespace upmoe::ops {

// Row i is row index_R[i] / divisor of from_XD.
struct PickedRows {
  ConstTensorView from_XD, index_R;
  std::int64_t divisor = 1;
};

struct ExpertFfn {
  ConstTensorView gate_up_eGD, down_eDF;
  ConstTensorView weight_R;  // fp32
  ExpertRows rows;
};

struct ExpertActivations {
  TensorView x_RD, gate_up_RG, h_RF;
};
// Writes y_RD, and of `kept` what is given.
void expert_ffn_forward(Exec& ex, TensorView y_RD, const ExpertActivations& kept, const PickedRows& x,
                        const ExpertFfn& f);

struct ExpertGradients {
  TensorView dx_RD, dweight_R;    // what the rows' senders want
  TensorView dy_RD, dgate_up_RG;  // what the weights' gradients are made of
};
// Overwrites all of `g`.
void expert_ffn_backward(Exec& ex, const ExpertGradients& g, const PickedRows& dy, ConstTensorView gate_up_RG,
                         const ExpertFfn& f);
// += , each where it is given. An absent h_RF is made again, from gate_up_RG; no ledger sees that.
void expert_ffn_wgrad(Exec& ex, TensorView dgate_up_eGD, TensorView ddown_eDF, const ExpertActivations& a,
                      const ExpertGradients& g, const ExpertFfn& f);

}  // namespace upmoe::ops
