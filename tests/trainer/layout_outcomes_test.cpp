// Results are computed once for each case: no case may get another's.

#include "tests/support/layout_outcomes.h"

#include <gtest/gtest.h>

namespace upmoe {
namespace {

using test::Layout;

auto decided_on_one_rank(const Layout& l) {
  return test::deciding(test::on_one_rank(l));
}

// Each changes one field alone.
const std::vector<std::function<void(Layout&)>> kDeciding{
    [](Layout& l) { l.model = "moe_odd"; },
    [](Layout& l) { l.micro_batch = 2; },
    [](Layout& l) { l.recompute = Recompute::kBlock; },
    [](Layout& l) { l.precision = Precision::kBf16; },
    [](Layout& l) { l.mask_documents = true; },
    [](Layout& l) { l.z_loss = 1e-9; },
    [](Layout& l) { l.aux_loss = 1e-9; },
    [](Layout& l) { l.aux_kinds = {AuxKind::kSwitch}; },
    [](Layout& l) { l.aux_groups = 2; },
    [](Layout& l) { l.steps = 6; },
    [](Layout& l) { l.reduce = Precision::kBf16; },
    [](Layout& l) { l.optimizer = OptimizerKind::kAdamW8bit; },
    [](Layout& l) { l.order_seed = 1; },
    [](Layout& l) { l.router = RouterDType::kFp32; },
    [](Layout& l) { l.router_bias = true; },
    [](Layout& l) { l.experts = ExpertsPath::kFused; },
    [](Layout& l) { l.width = 64; },
    [](Layout& l) { l.width = 128; },
    [](Layout& l) { l.num_experts = 3; },
    [](Layout& l) { l.form = RouterForm{}; },
    [](Layout& l) { l.with_form().temperature = 0.5; },
    [](Layout& l) { l.choices = 1; },
    [](Layout& l) { l.renormalize = true; },
    [](Layout& l) { l.bias_rate = 1e-9; },
    [](Layout& l) { l.eps = 1e-9; },
    [](Layout& l) { l.loss_mask = test::LossMask::kSome; },
    [](Layout& l) { l.freeze = {"embed"}; },
    [](Layout& l) { l.lora.rank = 2; },
    [](Layout& l) { l.lora.alpha = 8; },
    [](Layout& l) { l.lora.targets = {LoraTarget::kUp}; },
};

TEST(OneRank, ResultsAreKeptByAllThatDecidesThem) {
  std::vector<Layout> all{Layout{"moe_mixed", {}}};
  for (const auto& change : kDeciding) change(all.emplace_back(all.front()));
  for (std::size_t i = 0; i < all.size(); ++i)
    for (std::size_t j = 0; j < all.size(); ++j)
      EXPECT_EQ(decided_on_one_rank(all[i]) == decided_on_one_rank(all[j]), i == j) << i << " and " << j;
}

TEST(OneRank, ResultsAreThoseOfEveryMesh) {
  const Layout plain{"moe_mixed", {}};
  Layout spread = plain;
  spread.mesh = {2, 2, 1, 1, 2, 1};
  spread.pp_chunks = 2;
  spread.node_ranks = 2;
  spread.zero = 2;
  EXPECT_TRUE(decided_on_one_rank(spread) == decided_on_one_rank(plain));
  EXPECT_EQ(&test::one_rank(spread), &test::one_rank(plain));
}

TEST(OneRank, ModelsOfTwoWidthsAreTwo) {
  Layout narrow{"moe_mixed", {}}, wide = narrow;
  narrow.num_experts = wide.num_experts = 3;
  narrow.steps = wide.steps = 1;
  wide.width = 64;
  const test::Outcome &of_narrow = test::one_rank(narrow), &of_wide = test::one_rank(wide);
  EXPECT_NE(of_narrow.losses, of_wide.losses);
  EXPECT_EQ(of_wide.losses, test::run_in_layout(wide).losses);
}

TEST(OneRank, RefusesWhatCannotBeCompared) {
  Layout changed{"moe_mixed", {}};
  changed.change = [](RunConfig&) {};
  EXPECT_THROW(test::one_rank(changed), Error);
}

}  // namespace
}  // namespace upmoe
