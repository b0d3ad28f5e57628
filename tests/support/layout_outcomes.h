#pragma once
// What two layouts of one run came to, compared.

#include "configs/lora_record.h"
#include "configs/router_record.h"
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

// The same run on one rank, once for each.
inline const Outcome& one_rank(const Layout& like) {
  static std::map<std::string, Outcome> done;
  Layout one = like;
  one.mesh = {};
  one.pp_chunks = 1;
  one.node_ranks = 0;
  one.zero = 1;
  std::string kinds;
  for (const AuxKind kind : one.aux_kinds) kinds += name_of(kind);
  const std::string key =
      one.str() + name_of(one.recompute) + name_of(one.precision) + name_of(one.reduce) + kinds +
      name_of(one.optimizer) +
      fmt::format("{}{}{}{}{}{}{}{}{}{}{}", words_of(one.lora), fmt::join(one.freeze, ","),
                  static_cast<int>(one.loss_mask), one.mask_documents, one.z_loss, one.steps, one.choices,
                  one.renormalize, one.form ? words_of(*one.form) : "own", one.bias_rate, one.eps);
  auto it = done.find(key);
  if (it == done.end()) it = done.emplace(key, run_in_layout(one)).first;
  return it->second;
}

}  // namespace upmoe::test
