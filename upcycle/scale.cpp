#include "upcycle/scale.h"

#include "upcycle/unit_map.h"

namespace upmoe {

std::int64_t shards_per_copy(std::int64_t dense_width, std::int64_t width) {
  return (dense_width + width - 1) / width;
}

// The algebra. F(x) = sum over the I dense neurons of d_j a_j(x), a_j = silu(g_j x)(u_j x). The mixture gives
//   M(x) = sum over the T chosen experts of p_e * c * sum over the expert's w neurons of d_j a_j(x).
//
// Shards (virtual groups; I padded to G*w with neurons of zero down column): G experts, one of each shard, sum to F.
//   Renormalised weights, equal within a group: T/G groups are chosen and the weights of all T add up to 1,
//   so those of one expert of each group add up to 1/G:   M = c F / G           ->  c = G
//   Weights not renormalised, uniform p = 1/N:            M = c (1/N) (T/G) F   ->  c = N G / T
//   (N = E*G experts: the E*G^2/T of the virtual-group paper; N when T = G.)
//   Sigmoids not renormalised, p = 1/2 where the router's product is near 0: c = 2 G / T
//
// Neurons taken at random or in overlapping stretches, of which the part 1 - r is kept. A chosen expert holds
// a neuron w (1-r) / I times on average, so with weights P in all (P = 1 renormalised, T/N uniform):
//                                                E[M] = c P w (1-r) / I F   ->  c = I / (w (1-r) P)
//   (of sigmoids P = T/2)
//   60 of 1408 out of 5504, top-4, not renormalised: 58.6 for r = 0 and 117.3 for r = 1/2. Unbiased, not exact.
//
// Whole copies are the case I = w of the second line and G = 1 of the first: c = 1 renormalised, N / T otherwise.
// Clusters of neurons that are active together: the T chosen experts add what they have, the others would add little;
// their weights are P / T on average, so c = T / P, exact where all are chosen by a router of zeros.
// A redraw in shards keeps the part 1 - r as well. 1 - r is what is really kept: whole units of every expert.
double resolve_scale(const UpcycleConfig& config, std::int64_t dense_width, RouterScore score) {
  const auto& experts = config.experts;
  if (experts.scale) return *experts.scale;
  const bool shared_carries =
      config.shared.method == SharedMethod::kDense && config.target.shared_expert_intermediate_size > 0;
  const auto width = static_cast<double>(config.target.moe_intermediate_size);
  const std::int64_t redrawn = redrawn_units(experts.reinit, config.target.moe_intermediate_size);
  const double kept = width - static_cast<double>(redrawn);
  if (shared_carries || experts.method == ExpertMethod::kRandom || kept == 0) return 1.0;

  const bool shards = experts.method == ExpertMethod::kVirtualGroup;
  const double neurons =
      shards ? static_cast<double>(shards_per_copy(dense_width, config.target.moe_intermediate_size)) * width
             : static_cast<double>(dense_width);
  // Of one expert's weight.
  const double inverse = score == RouterScore::kSigmoid ? 2 : config.target.num_experts;
  const double weights = config.target.norm_topk_prob ? 1.0 : config.target.num_experts_per_tok / inverse;
  // Clusters: the chosen experts are those that have something to say, not a sample of all. Each counts once.
  if (experts.method == ExpertMethod::kCluster)
    return width / kept * config.target.num_experts_per_tok / weights;
  return neurons / (kept * weights);
}

double resolve_shared_scale(const UpcycleConfig& config, bool gate) {
  return config.shared.scale.value_or(gate ? 2.0 : 1.0);
}

}  // namespace upmoe
