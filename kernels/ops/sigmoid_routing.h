#pragma once
// Routing by sigmoid scores with a bias on the choice (DeepSeek-V3, arXiv 2412.19437, 2.1.2; transformers'
// DeepseekV3TopkRouter and Dots1TopkRouter): s_e = sigmoid(logit_e); experts are chosen by s_e + bias_e, and weighed by
// s_e alone. Values are fp32, indices int32.

#include "kernels/ops/routing.h"

namespace upmoe {

struct SigmoidRule {
  // E experts lie in `groups` of E / groups, in order; a token may choose from the group_topk groups whose two largest
  // s_e + bias_e have the largest sum. One group: from all. At most kMostExpertGroups.
  std::int64_t groups = 1, group_topk = 1;
  bool renormalize = true;  // weights: s_e over the sum of the chosen experts' s + 1e-20
  float scale = 1;          // then times this
};
struct SigmoidRoutes {
  // s_e over the sum of all experts' s (+ 1e-20): the probabilities of the balance terms.
  TensorView probs_TE;
  TensorView index_TK, weight_TK, lse_T;
};
// What the backward needs; it computes the scores again.
struct SigmoidSaved {
  ConstTensorView logits_TE, index_TK, lse_T;
};

}  // namespace upmoe

namespace upmoe::ops {

// Chosen are the K largest s_e + bias_e, in falling order, the lowest index first among equals, of groups likewise.
// bias_E may be absent. lse_T: log-sum-exp of the logits. A non-finite logit throws Error(kNumeric).
void route_sigmoid(Exec& ex, const SigmoidRoutes& out, ConstTensorView logits_TE, ConstTensorView bias_E,
                   const SigmoidRule& rule);

// dlogits_TE (overwritten) from dweight_TK and the balance terms, whose aux is of the probabilities. The bias has no
// gradient.
void route_sigmoid_backward(Exec& ex, TensorView dlogits_TE, ConstTensorView dweight_TK,
                            const TermGradient& terms, const SigmoidSaved& saved, const SigmoidRule& rule);

}  // namespace upmoe::ops
