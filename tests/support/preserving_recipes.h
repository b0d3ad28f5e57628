#pragma once
// Recipes for small dense models whose mixtures begin as the same function.

#include <vector>

#include "tests/support/tiny_dense.h"

namespace upmoe::test {

// Recipes that keep the function, one of each kind that families differ in.
inline std::vector<UpcycleConfig> preserving_recipes(int ffn) {
  UpcycleConfig copies = tiny_recipe();
  copies.target = {
      .num_experts = 4, .num_experts_per_tok = 2, .moe_intermediate_size = ffn, .norm_topk_prob = true};
  copies.experts.method = ExpertMethod::kCopy;
  copies.shared.method = SharedMethod::kNone;
  UpcycleConfig groups = copies;  // fine-grained
  groups.target.num_experts = 8;
  groups.target.moe_intermediate_size = ffn / 2;
  groups.experts.method = ExpertMethod::kVirtualGroup;
  groups.router.method = RouterMethod::kVirtualGroup;
  UpcycleConfig shared = groups;  // half from the shared expert, with and without the sum of weights
  shared.target.shared_expert_intermediate_size = ffn;
  shared.shared.method = SharedMethod::kDense;
  shared.experts.scale = 0;
  UpcycleConfig plain = shared;
  plain.target.norm_topk_prob = false;
  plain.target.layers = {LayerChoice::Kind::kFirstDense, 1, {}};
  return {copies, groups, shared, plain};
}

}  // namespace upmoe::test
