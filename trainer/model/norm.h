#pragma once
// A norm of rows as a layer, of each kind that models have, and the residual stream that it reads.

#include "configs/model_traits.h"
#include "trainer/model/layer.h"

namespace upmoe {

// The residual stream between two layers. A layer's branch may still have to be added to it: the norm that reads the
// stream does so in its own pass where it can, and writes the sum.
struct Residual {
  ConstTensorView x_TD;
  ConstTensorView branch_TD = {};  // absent: x_TD is the whole stream
  TensorView sum_TD = {};          // of both; where it goes
};
// The stream as one tensor, where no norm reads it first.
ConstTensorView summed(Exec& ex, const Residual& residual);

struct Norm {
  Param weight_D;
  float eps = 1e-6f;
  NormKind kind = NormKind::kRms;
  struct Saved {
    ConstTensorView x_TD;
    TensorView mean_T, rstd_T;  // mean_T: of a LayerNorm
  };

  // y_TD may be the stream's branch.
  void forward(Exec& ex, TensorView y_TD, const Residual& residual, Arena& keep, Saved& saved) const;
  // y_TD as forward made it, from what is saved.
  void again(Exec& ex, TensorView y_TD, const Saved& saved) const;
  void backward(Exec& ex, TensorView dx_TD, Accumulate mode, ConstTensorView dy_TD, const Saved& saved) const;
};

}  // namespace upmoe
