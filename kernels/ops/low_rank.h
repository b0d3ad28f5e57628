#pragma once
// What a low-rank adapter adds to a product with a weight, and its gradients: two products each, in the dtype of the
// rows, where those with the weight alone have one. L is the rank.
//
// An adapter that is absent adds nothing.

#include "kernels/ops/expert_rows.h"

namespace upmoe {
// scale b_NL a_LK beside a weight w_NK; of experts, a_eLK and b_eNL.
struct LowRank {
  ConstTensorView a, b;
  float scale = 1;
  bool given() const { return a.given(); }
  std::int64_t rank() const { return a.shape[-2]; }
};
struct LowRankGradient {
  GradientView a, b;
};
}  // namespace upmoe

namespace upmoe::ops {

// y_TN += scale (x_TK a^T) b^T.
void add_low_rank(Exec& ex, TensorView y_TN, ConstTensorView x_TK, const LowRank& w);
// dz_TL = scale dy_TN b, overwritten; dx_TK += dz a.
void low_rank_dgrad(Exec& ex, TensorView dx_TK, TensorView dz_TL, ConstTensorView dy_TN, const LowRank& w);
// da (+)= dz_TL^T x_TK, db (+)= scale dy_TN^T (x a^T); the second factor is made again.
void low_rank_wgrad(Exec& ex, const LowRankGradient& dw, ConstTensorView dz_TL, ConstTensorView dy_TN,
                    ConstTensorView x_TK, const LowRank& w);

// The same of each expert's rows.
void add_low_rank(Exec& ex, TensorView y_RN, ConstTensorView x_RK, const LowRank& w, const ExpertRows& rows);
void low_rank_dgrad(Exec& ex, TensorView dx_RK, TensorView dz_RL, ConstTensorView dy_RN, const LowRank& w,
                    const ExpertRows& rows);
// What a low_rank_wgrad of experts is made of: the gradient of the output, that of x a^T, and the input.
struct LowRankRows {
  ConstTensorView dy_RN, dz_RL, x_RK;
};
void low_rank_wgrad(Exec& ex, const LowRankGradient& dw, const LowRankRows& o, const LowRank& w,
                    const ExpertRows& rows);

}  // namespace upmoe::ops
