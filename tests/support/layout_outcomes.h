#pragma once
// What two layouts of one run came to, compared.

#include <list>
#include <tuple>

#include "tests/support/layout_run.h"
#include "tests/support/tolerance.h"

namespace upmoe::test {

struct Limits {
  double loss = 1e-6, gradient = 1e-5, norm = 1e-6, weights = 1e-5;
};

inline void expect_equal(const Outcome& one, const Outcome& many, const Limits& limits = {}) {
  ASSERT_EQ(one.losses.size(), many.losses.size());
  for (std::size_t i = 0; i < one.losses.size(); ++i) {
    EXPECT_NEAR(many.losses[i], one.losses[i], limits.loss * one.losses[i]) << "loss of step " << i + 1;
    EXPECT_NEAR(many.auxes[i], one.auxes[i], 10 * limits.loss * std::abs(one.auxes[i])) << "step " << i + 1;
    EXPECT_NEAR(many.zs[i], one.zs[i], 10 * limits.loss * std::abs(one.zs[i])) << "step " << i + 1;
    EXPECT_NEAR(many.norms[i], one.norms[i], (i == 0 ? 1 : 10) * limits.norm * one.norms[i])
        << "gradient norm of step " << i + 1;
  }
  EXPECT_EQ(one.loads.front(), many.loads.front()) << "who computed which token";
  ASSERT_EQ(one.gradients.size(), many.gradients.size());
  for (const auto& [name, expected] : one.gradients) {
    // The norm of a gradient that is zero but for rounding (k's bias) is taken as that of those around it.
    EXPECT_LT(relative_distance(expected, many.gradients.at(name), 1e-3 * one.norms[0]), limits.gradient)
        << "gradient of " << name;
    if (name.ends_with("attn.k_NH")) continue;  // AdamW makes whole steps of a gradient of rounding alone
    EXPECT_LT(relative_distance(one.weights.at(name), many.weights.at(name)), limits.weights) << name;
  }
}

// The same run on one rank.
inline Layout on_one_rank(const Layout& like) {
  Layout one = like;
  one.mesh = {};
  one.pp_chunks = 1;
  one.node_ranks = 0;
  one.zero = 1;
  return one;
}

// All that decides what a layout comes to, to compare it with another one's. A field of Layout that is not named here
// does not compile.
inline auto deciding(const Layout& layout) {
  const auto& [model, mesh, micro_batch, pp_chunks, recompute, precision, mask_documents, z_loss, aux_loss,
               aux_kinds, aux_groups, steps, node_ranks, zero, reduce, optimizer, order_seed, router,
               router_bias, experts, width, num_experts, form, choices, renormalize, bias_rate, eps,
               loss_mask, freeze, lora, change] = layout;
  UPMOE_CHECK(!change, "{}: what a function changes cannot be compared", layout.str());
  return std::make_tuple(model, mesh.str(), micro_batch, pp_chunks, recompute, precision, mask_documents,
                         z_loss, aux_loss, aux_kinds, aux_groups, steps, node_ranks, zero, reduce, optimizer,
                         order_seed, router, router_bias, experts, width, num_experts, form, choices,
                         renormalize, bias_rate, eps, loss_mask, freeze, lora.rank, lora.alpha, lora.targets);
}

// What it comes to on one rank, computed once for each.
inline const Outcome& one_rank(const Layout& like) {
  static std::list<std::pair<decltype(deciding(like)), Outcome>> done;
  const Layout one = on_one_rank(like);
  const auto key = deciding(one);
  for (const auto& [of, outcome] : done)
    if (of == key) return outcome;
  return done.emplace_back(key, run_in_layout(one)).second;
}

}  // namespace upmoe::test
