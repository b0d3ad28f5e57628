#pragma once
// A SwiGLU feed-forward, and the same with a scalar sigmoid gate per token: the shared expert of a mixture.

#include <optional>

#include "trainer/model/linear.h"

namespace upmoe {

struct DenseFfn {
  Linear gate_up;  // [2F, D], gate and up rows of a neuron are neighbours
  Linear down;     // [D, F]
  std::optional<Param>
      gate_1D;  // the shared expert's gate: multiplies the hidden row, which equals multiplying the output
  struct Saved {
    ConstTensorView x_TD;
    TensorView gate_up_TG, h_TF, gate_T;
  };

  void forward(Exec& ex, TensorView y_TD, ConstTensorView x_TD, Arena& keep, Saved& saved) const;
  void backward(Exec& ex, TensorView dx_TD, ConstTensorView dy_TD,
                const Saved& saved) const;  // overwrites dx
};

}  // namespace upmoe
