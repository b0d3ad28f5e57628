#pragma once
// Root-mean-square norm as a layer.

#include "trainer/model/layer.h"

namespace upmoe {

struct RmsNorm {
  Param weight_D;
  float eps = 1e-6f;
  bool plus_one = false;  // the weight is added to one
  struct Saved {
    ConstTensorView x_TD;
    TensorView rstd_T;
  };

  void forward(Exec& ex, TensorView y_TD, ConstTensorView x_TD, Arena& keep, Saved& saved) const;
  // y_TD = norm(sum_TD), sum_TD = x_TD + residual_TD.
  void forward_add(Exec& ex, TensorView y_TD, TensorView sum_TD, ConstTensorView x_TD,
                   ConstTensorView residual_TD, Arena& keep, Saved& saved) const;
  void backward(Exec& ex, TensorView dx_TD, Accumulate mode, ConstTensorView dy_TD, const Saved& saved) const;
};

}  // namespace upmoe
