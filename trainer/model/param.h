#pragma once
// What layers know of a parameter.

#include <span>

#include "kernels/core/tensor.h"

namespace upmoe {

// A parameter as this rank computes with it: views of its shard. `grad` is absent when gradients are not
// wanted (evaluation) or the parameter is frozen; layers then skip its gradient.
struct Param {
  TensorView value, grad;
  // Which of the gradients that lie in `grad` have been written in this step: the ParamStore's. Without it there is
  // always something to add to.
  std::span<bool> written = {};
  bool wants_grad() const { return grad.given(); }
  // For an op that has a gradient to put there, at once: the first of a step writes over what the step before left,
  // the others add. Absent when it is not wanted.
  GradientView write_grad() const {
    if (!wants_grad() || written.empty()) return grad;
    const bool first = !written.front();
    for (bool& w : written) {
      UPMOE_CHECK(w != first, "of gradients that are one product some are written and some are not");
      w = true;
    }
    return {grad, first ? Accumulate::kOverwrite : Accumulate::kAdd};
  }
  Param as(Shape shape) const {  // the same elements under another shape
    return Param{value.reshape(shape), wants_grad() ? grad.reshape(shape) : TensorView{}, written};
  }
};

}  // namespace upmoe
