// Routing by sigmoid scores. One warp has one token; a lane has every 32nd expert, in registers (routing.cu).

#include "kernels/ops/sigmoid_routing.h"

#include "kernels/core/expert_groups.h"
#include "kernels/cuda/portable/router_lanes.cuh"
#include "kernels/ops/backend.h"

namespace upmoe::cuda {

namespace {

constexpr float kTiny = 1e-20f;  // as in transformers: no division by zero where all scores vanish
static_assert(kMostExpertGroups <= kWarp, "a lane has each group's score, and a word a bit for each group");

__device__ inline float score_of(float logit) {
  return 1.0f / (1.0f + expf(-logit));
}

struct SigmoidOut {
  float *probs, *weight, *lse;
  std::int32_t* index;
};
struct Rule {
  float scale;
  int groups, group_topk;
  bool renormalize;
};

// Leaves the values of the experts that may be chosen from; the others become what is never chosen.
template <int N>
__device__ void keep_best_groups(float (&value)[N], int lane, int experts, const Rule& rule) {
  const int width = experts / rule.groups;
  float mine = -INFINITY;  // lane g: the score of group g
  for (int g = 0; g < rule.groups; ++g) {
    const auto in_group = [&](int e) { return e / width == g && e < experts; };
    const Best first = largest(value, lane, in_group),
               second = largest(value, lane, [&](int e) { return in_group(e) && e != first.expert; });
    if (lane == g) mine = first.value + second.value;
  }
  unsigned kept = 0;
  for (int j = 0; j < rule.group_topk; ++j) {
    Best best{lane < rule.groups && (kept >> lane & 1u) == 0 ? mine : -INFINITY, lane};
    best = best_of_warp(best);
    kept |= 1u << best.expert;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int e = i * kWarp + lane;
    if (e < experts && (kept >> (e / width) & 1u) == 0) value[i] = -INFINITY;
  }
}

template <int N>
__global__ void route_by_sigmoid(SigmoidOut out, const float* logits, const float* bias, std::int64_t tokens,
                                 int experts, int k, Rule rule, FindingWords findings) {
  const std::int64_t t = global_thread() / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if (t >= tokens) return;
  float score[N], value[N], top = -INFINITY, sum = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int e = i * kWarp + lane;
    const float logit = e < experts ? logits[t * experts + e] : -INFINITY;
    if (e < experts && !isfinite(logit)) find(findings, Finding::kLogit, t, static_cast<std::uint32_t>(e));
    top = fmaxf(top, logit);
    score[i] = e < experts ? score_of(logit) : 0.0f;
    sum += score[i];
    value[i] = e < experts ? score[i] + (bias == nullptr ? 0.0f : bias[e]) : -INFINITY;
    // NaNs come last of what may be chosen: what is chosen is always an expert.
    if (isnan(value[i])) value[i] = -3e38f;
  }
  top = warp_max(top);
  sum = warp_sum(sum) + kTiny;
  float exps = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int e = i * kWarp + lane;
    if (e >= experts) continue;
    exps += expf(logits[t * experts + e] - top);
    out.probs[t * experts + e] = score[i] / sum;
  }
  exps = warp_sum(exps);
  if (lane == 0) out.lse[t] = top + logf(exps);
  if (rule.groups > 1) keep_best_groups(value, lane, experts, rule);
  float chosen = kTiny;
  for (int j = 0; j < k; ++j) {
    const Best best = largest(value, lane, [&](int e) { return e < experts; });
    float weight = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i * kWarp + lane != best.expert) continue;
      value[i] = -INFINITY;
      weight = score[i];
    }
    weight = __shfl_sync(kAllLanes, weight, best.expert % kWarp);
    chosen += weight;
    if (lane != 0) continue;
    out.index[t * k + j] = best.expert;
    out.weight[t * k + j] = weight;
  }
  // Lane 0 wrote the weights that all lanes now divide.
  __syncwarp();
  for (int j = lane; j < k; j += kWarp) {
    float& weight = out.weight[t * k + j];
    weight = (rule.renormalize ? weight / chosen : weight) * rule.scale;
  }
}

struct SigmoidGradient {
  float* dlogits;
  const float *logits, *dweight, *aux, *lse;
  const std::int32_t *index, *aux_row;
  float z_scale;
};

// With s = sigmoid(h), S the sum over all experts and p = s / S: ds_e = (aux_e - sum_j aux_j p_j) / S, and of a chosen
// expert scale (dw_k - sum_j dw_j s_j / C) / C more, C the sum over the chosen ones, or scale dw_k without
// renormalisation; dh_e = ds_e s_e (1 - s_e) + 2 z_scale lse exp(h_e - lse).
template <int N>
__global__ void route_by_sigmoid_backward(SigmoidGradient g, std::int64_t tokens, int experts, int k,
                                          Rule rule) {
  const std::int64_t t = global_thread() / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if (t >= tokens) return;
  const float* logits = g.logits + t * experts;
  const float* aux = g.aux_row == nullptr ? g.aux : g.aux + static_cast<std::int64_t>(g.aux_row[t]) * experts;
  float chosen = 1, shift = 0;
  if (rule.renormalize) {
    chosen = kTiny;
    for (int j = 0; j < k; ++j) {
      const float s = score_of(logits[g.index[t * k + j]]);
      chosen += s;
      shift += g.dweight[t * k + j] * s;
    }
    shift /= chosen;
  }
  float sum = 0, mean = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int e = i * kWarp + lane;
    if (e >= experts) continue;
    const float s = score_of(logits[e]);
    sum += s;
    mean += aux[e] * s;
  }
  sum = warp_sum(sum) + kTiny;
  mean = warp_sum(mean) / sum;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int e = i * kWarp + lane;
    if (e >= experts) continue;
    float ds = (aux[e] - mean) / sum;
    for (int j = 0; j < k; ++j)
      if (g.index[t * k + j] == e) ds += rule.scale * (g.dweight[t * k + j] - shift) / chosen;
    const float h = logits[e], s = score_of(h);
    g.dlogits[t * experts + e] = ds * s * (1.0f - s) + 2.0f * g.z_scale * g.lse[t] * expf(h - g.lse[t]);
  }
}

Rule rule_of(const SigmoidRule& rule) {
  return {rule.scale, static_cast<int>(rule.groups), static_cast<int>(rule.group_topk), rule.renormalize};
}

}  // namespace

void route_sigmoid(Exec& ex, const SigmoidRoutes& out, ConstTensorView logits_TE, ConstTensorView bias_E,
                   const SigmoidRule& rule) {
  const std::int64_t tokens = logits_TE.shape[0], experts = logits_TE.shape[1];
  const SigmoidOut to{out.probs_TE.as<float>(), out.weight_TK.as<float>(), out.lse_T.as<float>(),
                      out.index_TK.as<std::int32_t>()};
  with_experts_per_lane(experts, [&](auto n) {
    launch(ex, blocks_for(tokens, kThreads / kWarp), kThreads, route_by_sigmoid<n.value>, to,
           logits_TE.as<float>(), bias_E.given() ? bias_E.as<float>() : nullptr, tokens,
           static_cast<int>(experts), static_cast<int>(out.index_TK.shape[1]), rule_of(rule),
           stream_of(ex).findings());
  });
}

void route_sigmoid_backward(Exec& ex, TensorView dlogits_TE, ConstTensorView dweight_TK,
                            const TermGradient& terms, const SigmoidSaved& saved, const SigmoidRule& rule) {
  const std::int64_t tokens = dlogits_TE.shape[0], experts = dlogits_TE.shape[1];
  SigmoidGradient g{};
  g.dlogits = dlogits_TE.as<float>();
  g.logits = saved.logits_TE.as<float>();
  g.dweight = dweight_TK.as<float>();
  g.aux = terms.aux.as<float>();
  g.lse = saved.lse_T.as<float>();
  g.index = saved.index_TK.as<std::int32_t>();
  g.aux_row = terms.row_T.given() ? terms.row_T.as<std::int32_t>() : nullptr;
  g.z_scale = terms.z_scale;
  with_experts_per_lane(experts, [&](auto n) {
    launch(ex, blocks_for(tokens, kThreads / kWarp), kThreads, route_by_sigmoid_backward<n.value>, g, tokens,
           static_cast<int>(experts), static_cast<int>(dweight_TK.shape[1]), rule_of(rule));
  });
}

}  // namespace upmoe::cuda
