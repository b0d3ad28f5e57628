#include "configs/expert_use.h"

#include <algorithm>
#include <cmath>

namespace upmoe {

std::int64_t expert_capacity(double factor, std::int64_t choices, std::int64_t experts) {
  const double share = factor * static_cast<double>(choices) / static_cast<double>(experts);
  return std::max<std::int64_t>(1, static_cast<std::int64_t>(std::ceil(share * (1 - 1e-12))));
}

double choices_on_the_mean(const ModelConfig& model) {
  return model.router.capacity_factor > 0 ? model.router.capacity_factor : model.num_experts_per_tok;
}

std::int64_t chosen_of_group(double choices, std::int64_t tokens, std::int64_t experts) {
  return std::min(tokens, expert_capacity(choices, tokens, experts));
}

ExpertUse expert_use(const ModelConfig& model) {
  const std::int64_t group = least_sequences(model);
  switch (model.router.kind) {
    case RouterKind::kTopK:
    case RouterKind::kNoisy:
    case RouterKind::kSwitch:
    case RouterKind::kGShard:
      break;
    case RouterKind::kExpertChoice:
      return {model.num_experts * chosen_of_group(choices_on_the_mean(model), group, model.num_experts),
              group};
    case RouterKind::kMixtureOfTokens:
      return {model.num_experts, group};
  }
  return {model.num_experts_per_tok, 1};
}

std::int64_t least_sequences(const ModelConfig& model) {
  return model.routes_groups() ? std::max(1, model.router.group_size) : 1;
}

}  // namespace upmoe
