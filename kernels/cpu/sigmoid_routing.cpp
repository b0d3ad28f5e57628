#include "kernels/ops/sigmoid_routing.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "kernels/core/expert_groups.h"
#include "kernels/cpu/router_rows.h"
#include "kernels/cpu/vector_math.h"
#include "kernels/ops/backend.h"

namespace upmoe::cpu {

namespace {

constexpr float kTiny = 1e-20f;  // as in transformers: no division by zero where all scores vanish

// Lanes behind the last expert load as 0, of which neither exp nor sigmoid is 0: what is summed is stored first.
float sum_of(const float* row, std::int64_t experts) {
  return sum_lanes(experts, [&](std::int64_t e, auto lanes) { return load(row + e, lanes); });
}

float log_sum_exp(float* exps, const float* logits, std::int64_t experts) {
  const float largest = *std::max_element(logits, logits + experts);
  for_lanes(experts, [&](std::int64_t e, auto lanes) {
    store(exps + e, vector_exp(load(logits + e, lanes) - largest), lanes);
  });
  return largest + std::log(sum_of(exps, experts));
}

void scores_of(float* scores, const float* logits, std::int64_t experts) {
  for_lanes(experts, [&](std::int64_t e, auto lanes) {
    store(scores + e, vector_sigmoid(load(logits + e, lanes)), lanes);
  });
}

// Offers the experts that the token may choose from.
template <class Choice>
void offer_groups(TopK& top, const SigmoidRule& rule, std::int64_t experts, const Choice& choice) {
  const std::int64_t width = experts / rule.groups;
  std::array<std::int32_t, kMostExpertGroups> best;
  std::array<float, kMostExpertGroups> score;
  TopK groups{best.data(), score.data(), rule.groups == 1 ? 1 : rule.group_topk};
  for (std::int64_t g = 0; g < rule.groups; ++g) {
    if (rule.groups == 1) {
      groups.offer(0, 0);
      break;
    }
    std::array<std::int32_t, 2> two;
    std::array<float, 2> largest;
    TopK pair{two.data(), largest.data(), 2};
    for (std::int64_t e = g * width; e < (g + 1) * width; ++e) pair.offer(e, choice(e));
    groups.offer(g, largest[0] + largest[1]);
  }
  // In their order: among equal experts the lowest index is to come first.
  std::sort(best.begin(), best.begin() + groups.found);
  for (std::int64_t i = 0; i < groups.found; ++i)
    for (std::int64_t e = best[static_cast<std::size_t>(i)] * width, end = e + width; e < end; ++e)
      top.offer(e, choice(e));
}

struct Row {
  const float *logits, *dweight, *aux;
  const std::int32_t* index;
  float lse;
};

// With s = sigmoid(h), S the sum over all experts and p = s / S: ds_e = (aux_e - sum_j aux_j p_j) / S, and of a chosen
// expert scale (dw_k - sum_j dw_j s_j / C) / C more, C the sum over the chosen ones, or scale dw_k without
// renormalisation; dh_e = ds_e s_e (1 - s_e) + 2 z_scale lse exp(h_e - lse). dlogits serves as ds on the way.
void backward_row(float* dlogits, const Row& row, float z_scale, const Shape& shape,
                  const SigmoidRule& rule) {
  const std::int64_t experts = shape[0], k = shape[1];
  scores_of(dlogits, row.logits, experts);
  const float sum = kTiny + sum_of(dlogits, experts);
  const float mean =
      sum_lanes(experts, [&](std::int64_t e,
                             auto lanes) { return load(row.aux + e, lanes) * load(dlogits + e, lanes); }) /
      sum;
  for_lanes(experts, [&](std::int64_t e, auto lanes) {
    store(dlogits + e, (load(row.aux + e, lanes) - mean) / sum, lanes);
  });
  float chosen = 1, shift = 0;
  if (rule.renormalize) {
    chosen = kTiny;
    for (std::int64_t j = 0; j < k; ++j) {
      const float s = 1.0f / (1.0f + std::exp(-row.logits[row.index[j]]));
      chosen += s;
      shift += row.dweight[j] * s;
    }
    shift /= chosen;
  }
  for (std::int64_t j = 0; j < k; ++j)
    dlogits[row.index[j]] += rule.scale * (row.dweight[j] - shift) / chosen;
  const float of_lse = 2.0f * z_scale * row.lse;
  for_lanes(experts, [&](std::int64_t e, auto lanes) {
    const f32x16 h = load(row.logits + e, lanes), s = vector_sigmoid(h);
    store(dlogits + e, load(dlogits + e, lanes) * s * (1.0f - s) + of_lse * vector_exp(h - row.lse), lanes);
  });
}

}  // namespace

void route_sigmoid(Exec&, const SigmoidRoutes& out, ConstTensorView logits_TE, ConstTensorView bias_E,
                   const SigmoidRule& rule) {
  const std::int64_t tokens = logits_TE.shape[0], experts = logits_TE.shape[1], k = out.index_TK.shape[1];
  const float *logits = logits_TE.as<float>(), *bias = bias_E.given() ? bias_E.as<float>() : nullptr;
  require_finite(logits, tokens, experts);
  parallel_for(tokens, 16 * experts, [&](std::int64_t t) {
    float *scores = out.probs_TE.as<float>() + t * experts, *weight = out.weight_TK.as<float>() + t * k;
    const float* row = logits + t * experts;
    out.lse_T.as<float>()[t] = log_sum_exp(scores, row, experts);
    scores_of(scores, row, experts);
    TopK top{out.index_TK.as<std::int32_t>() + t * k, weight, k};
    offer_groups(top, rule, experts,
                 [&](std::int64_t e) { return bias == nullptr ? scores[e] : scores[e] + bias[e]; });
    float chosen = kTiny;
    for (std::int64_t j = 0; j < k; ++j) chosen += weight[j] = scores[top.index[j]];
    for (std::int64_t j = 0; j < k; ++j)
      weight[j] = (rule.renormalize ? weight[j] / chosen : weight[j]) * rule.scale;
    const float sum = kTiny + sum_of(scores, experts);
    for_lanes(experts,
              [&](std::int64_t e, auto lanes) { store(scores + e, load(scores + e, lanes) / sum, lanes); });
  });
}

void route_sigmoid_backward(Exec&, TensorView dlogits_TE, ConstTensorView dweight_TK,
                            const TermGradient& terms, const SigmoidSaved& saved, const SigmoidRule& rule) {
  const std::int64_t tokens = dlogits_TE.shape[0], experts = dlogits_TE.shape[1], k = dweight_TK.shape[1];
  const auto* index = saved.index_TK.as<std::int32_t>();
  const AuxRows aux(terms, tokens);
  require_in_range(index, tokens * k, experts, "index_TK");
  parallel_for(tokens, 16 * experts, [&](std::int64_t t) {
    const Row row{saved.logits_TE.as<float>() + t * experts, dweight_TK.as<float>() + t * k, aux.of(t),
                  index + t * k, saved.lse_T.as<float>()[t]};
    backward_row(dlogits_TE.as<float>() + t * experts, row, terms.z_scale, {experts, k}, rule);
  });
}

}  // namespace upmoe::cpu
