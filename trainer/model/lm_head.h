#pragma once
// Output projection and cross-entropy in chunks of rows: logits exist for one chunk at a time, and their
// gradient is spent in the same pass.

#include <functional>

#include "trainer/model/layer.h"

namespace upmoe {

struct LmHead {
  Param weight_VD;

  // Called with the fp32 logits of rows [begin, begin + logits.rows()).
  using Sink = std::function<void(std::int64_t begin, ConstTensorView logits_CV)>;

  // Adds the sum of the tokens' cross-entropies to loss_1 (fp64). With dx_TD: scale times the gradient of
  // that sum overwrites dx_TD and is added to the weight's gradient.
  void forward(Exec& ex, TensorView loss_1, ConstTensorView x_TD, ConstTensorView targets_T,
               const TensorView* dx_TD, float scale, const Sink& sink = {}) const;
};

}  // namespace upmoe
