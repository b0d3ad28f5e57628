#pragma once
// A norm of rows as a layer, of each kind that models have.

#include "configs/model_traits.h"
#include "trainer/model/layer.h"

namespace upmoe {

struct Norm {
  Param weight_D;
  float eps = 1e-6f;
  NormKind kind = NormKind::kRms;
  struct Saved {
    ConstTensorView x_TD;
    TensorView mean_T, rstd_T;  // mean_T: of a LayerNorm
  };

  void forward(Exec& ex, TensorView y_TD, ConstTensorView x_TD, Arena& keep, Saved& saved) const;
  // y_TD = norm(sum_TD), sum_TD = x_TD + residual_TD.
  void forward_add(Exec& ex, TensorView y_TD, TensorView sum_TD, ConstTensorView x_TD,
                   ConstTensorView residual_TD, Arena& keep, Saved& saved) const;
  void backward(Exec& ex, TensorView dx_TD, Accumulate mode, ConstTensorView dy_TD, const Saved& saved) const;
};

}  // namespace upmoe
