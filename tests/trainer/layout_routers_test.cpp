// Routers and balance terms other than the default ones: any mesh computes what one rank computes.

#include "tests/support/layout_outcomes.h"

namespace upmoe {
namespace {

using test::expect_equal;
using test::Layout;
using test::one_rank;
using test::Outcome;
using test::run_in_layout;

// All terms that are sums over layers or sequences, together, and the one that knows the step before. Where a sequence
// lies on several ranks, and several lie in a micro-batch.
TEST(Routers, EveryBalanceTerm) {
  for (const MeshSpec& mesh : {MeshSpec{1, 2, 1, 1, 1, 1},
                               {1, 1, 1, 2, 2, 1},
                               {1, 1, 2, 1, 1, 1},
                               {2, 1, 2, 2, 4, 1},
                               {1, 2, 1, 2, 2, 2},
                               {1, 1, 2, 2, 1, 4}})
    for (const RouterScore score : {RouterScore::kSoftmax, RouterScore::kSigmoid}) {
      Layout l{"moe_mixed", mesh, 2};
      SCOPED_TRACE(l.str());
      l.form = RouterForm{.score = score};
      l.aux_kinds = {AuxKind::kSequence, AuxKind::kGroup, AuxKind::kGlobal, AuxKind::kGShard, AuxKind::kHf};
      // Large, so that a mistake in a term would show: one that grows with it. At 0.05 alone of 0.02 to 0.25 an element
      // whose gradient is rounding alone takes AdamW's whole step in some meshes, 2e-6 of one step's loss.
      l.aux_loss = 0.25;
      l.aux_groups = 4;
      const Outcome &one = one_rank(l), many = run_in_layout(l);
      expect_equal(one, many);
      EXPECT_EQ(one.loads, many.loads) << "who computed which token, in every step";
      EXPECT_EQ(one.buffers, many.buffers);
      Layout without = l;
      without.aux_kinds = {AuxKind::kSequence};
      EXPECT_NE(one.norms.front(), one_rank(without).norms.front());
    }
}

// Sigmoid scores in groups, with biases that follow the counts of the whole step: to the bit the same on every mesh,
// as the counts are.
TEST(Routers, SigmoidScoresAndBiases) {
  for (const MeshSpec& mesh : {MeshSpec{1, 2, 1, 1, 1, 1},
                               {1, 4, 1, 1, 4, 1},
                               {1, 1, 2, 1, 1, 1},
                               {2, 1, 2, 2, 4, 1},
                               {1, 2, 1, 2, 2, 2},
                               {2, 2, 1, 1, 2, 1},
                               {1, 1, 2, 2, 1, 4}}) {
    Layout l{"moe_mixed", mesh, 1};
    SCOPED_TRACE(l.str());
    l.form = RouterForm{.score = RouterScore::kSigmoid, .groups = 2, .group_topk = 1, .scale = 2.5};
    l.bias_rate = 0.01;
    const Outcome &one = one_rank(l), many = run_in_layout(l);
    expect_equal(one, many);
    EXPECT_EQ(one.buffers, many.buffers);
    ASSERT_FALSE(one.buffers.empty());
    for (const auto& [name, bias] : one.buffers)
      for (std::size_t e = 0; e < bias.size(); ++e) {
        const double moved = (bias[e] - test::in_buffer(static_cast<std::int64_t>(e))) / l.bias_rate;
        EXPECT_NEAR(moved, std::round(moved), 1e-3) << name << ": whole steps";
        EXPECT_LE(std::abs(moved), 5.001) << name;
      }
    Layout plain = l;
    plain.bias_rate = 0;
    EXPECT_NE(one.loads.front(), one_rank(plain).loads.front()) << "the bias chooses";
  }
}

}  // namespace
}  // namespace upmoe
