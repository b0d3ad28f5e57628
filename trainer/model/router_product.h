#pragma once
// A router's one product: a logit for every token and expert. It is computed in the weight's dtype: beside an fp32
// weight, bf16 rows are widened for it, and its input gradient is rounded once.

#include "kernels/core/exec.h"
#include "trainer/model/param.h"

namespace upmoe {

struct RouterProduct {
  Param weight_ED;

  std::int64_t experts() const { return weight_ED.value.shape[0]; }
  void forward(Exec& ex, TensorView logits_TE,
               ConstTensorView x_TD) const;  // fp32; in the caller's ScratchScope
  // dx_TD += and the weight's gradient (+)=, from fp32 gradients of the logits.
  void backward(Exec& ex, TensorView dx_TD, ConstTensorView dlogits_TE, ConstTensorView x_TD) const;

 private:
  void add_input_gradient(Exec& ex, TensorView dx_TD, ConstTensorView dy_TE) const;
};

}  // namespace upmoe
