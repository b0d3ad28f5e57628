#pragma once
// A gated feed-forward (SwiGLU or GeGLU), and the same with a scalar sigmoid gate per token: the shared expert of a
// mixture. Under tp each rank computes its share of the width over all tokens. The gate multiplies the hidden row, so
// every rank's part of its gradient is a summand like those of the other weights that tp does not divide.

#include <optional>

#include "configs/model_traits.h"
#include "kernels/ops/routing.h"
#include "trainer/model/keep.h"
#include "trainer/model/linear.h"
#include "trainer/model/sequence_shards.h"

namespace upmoe {

struct DenseFfn {
  Linear gate_up;  // [2F, D], gate and up rows of a neuron are neighbours
  Linear down;     // [D, F]
  Communicator* tp = nullptr;
  // The shared expert's gate: multiplies the hidden row, which equals multiplying the output.
  std::optional<Param> gate_1D;
  Keep keeps;
  Activation activation = Activation::kSilu;
  struct Saved {
    ConstTensorView x_tD;
    TensorView gate_up_TG, h_TF, gate_T;
  };

  void forward(Exec& ex, TensorView y_tD, ConstTensorView x_tD, Arena& keep, Saved& saved) const;
  // Overwrites dx. Given `left`, who adds to dx next is left the gate's share of it, if there is one: in temporary
  // memory of the caller's ScratchScope. (Not under tp, whose ranks each add their own before they are summed.)
  void backward(Exec& ex, TensorView dx_tD, ConstTensorView dy_tD, const Saved& saved,
                GateGradient* left = nullptr) const;

 private:
  void hidden(Exec& ex, TensorView h_TF, ConstTensorView gate_up_TG, const Saved& saved) const;
  Exec booked_once(const Exec& ex) const;
  void gate_backward(Exec& ex, TensorView dx_TD, ConstTensorView dgate_T, ConstTensorView x_TD,
                     const Saved& saved) const;
};

}  // namespace upmoe
