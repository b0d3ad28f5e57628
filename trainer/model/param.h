#pragma once
// What layers know of a parameter.

#include "kernels/core/tensor.h"

namespace upmoe {

// A parameter as this rank computes with it: views of its shard. `grad` is absent when gradients are not
// wanted (evaluation) or the parameter is frozen; layers then skip its gradient.
struct Param {
  TensorView value, grad;
  bool wants_grad() const { return grad.given(); }
  Param as(Shape shape) const {  // the same elements under another shape
    return Param{value.reshape(shape), wants_grad() ? grad.reshape(shape) : TensorView{}};
  }
};

}  // namespace upmoe
