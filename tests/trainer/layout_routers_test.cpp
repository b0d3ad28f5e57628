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
      l.z_loss = 0.01;
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
    std::size_t mixture = 0;  // in the order of layers, as the buffers' names
    for (const auto& [name, bias] : one.buffers) {
      for (std::size_t e = 0; e < bias.size(); ++e) {
        double expected = test::in_buffer(static_cast<std::int64_t>(e));
        for (const auto& step : one.loads) {
          const double lacks = 1.0 / static_cast<double>(bias.size()) - step.at(mixture).at(e);
          if (std::abs(lacks) > 1e-9) expected += std::copysign(l.bias_rate, lacks);
        }
        EXPECT_NEAR(bias[e], expected, 1e-6) << name << ' ' << e;
      }
      ++mixture;
    }
    Layout plain = l;
    plain.bias_rate = 0;
    EXPECT_NE(one.loads.front(), one_rank(plain).loads.front()) << "the bias chooses";
  }
}

// What is drawn and what is dropped, where a sequence lies on several ranks, and several lie in a micro-batch.
const std::initializer_list<MeshSpec> kMeshes = {{1, 2, 1, 1, 1, 1}, {1, 1, 2, 1, 1, 1}, {1, 1, 1, 2, 2, 1},
                                                 {2, 1, 2, 2, 4, 1}, {1, 2, 1, 2, 2, 2}, {1, 1, 2, 2, 1, 4},
                                                 {1, 2, 1, 2, 4, 1}};

// Above the rounding of gradients: where tokens are dropped or hardly chosen, AdamW would make whole steps of elements
// whose gradient is rounding alone.
constexpr double kEps = 1e-5;

void expect_same_on_all(const Layout& like) {
  for (const MeshSpec& mesh : kMeshes) {
    Layout l = like;
    l.eps = kEps;
    l.mesh = mesh;
    SCOPED_TRACE(l.str());
    const Outcome &one = one_rank(l), many = run_in_layout(l);
    expect_equal(one, many);
    EXPECT_EQ(one.loads.front(), many.loads.front());
    EXPECT_EQ(one.dropped.front(), many.dropped.front());
  }
}

TEST(Routers, CapacityOfAnyPoolAndOrder) {
  for (const CapacityPool pool : {CapacityPool::kSequence, CapacityPool::kMicroBatch})
    for (const DropBy drop : {DropBy::kOrder, DropBy::kProbability}) {
      Layout l{"moe_mixed", {}, 2};
      l.with_form().capacity_factor = 0.75;
      l.with_form().capacity_pool = pool;
      l.with_form().drop = drop;
      SCOPED_TRACE(fmt::format("{}, {}", name_of(pool), name_of(drop)));
      expect_same_on_all(l);
      const Outcome& one = one_rank(l);
      // At most three quarters are taken, and what is added where capacities are rounded up.
      for (const double share : one.dropped) EXPECT_GE(share, 0.1) << name_of(pool);
      Layout all = l;
      all.form = {};
      EXPECT_NE(one.losses.front(), one_rank(all).losses.front());
      EXPECT_EQ(one_rank(all).dropped.front(), 0);
    }
}

TEST(Routers, SwitchWithOneExpert) {
  Layout l{"moe_mixed", {}, 2};
  l.choices = 1;
  l.aux_kinds = {AuxKind::kSwitch};
  l.with_form().kind = RouterKind::kSwitch;
  l.with_form().jitter = 0.01;
  l.with_form().capacity_factor = 1.25;
  expect_same_on_all(l);
}

// In training the second choices are those that were drawn: without them the loss is another one, with them it is the
// same everywhere.
TEST(Routers, GShardWithDrawnSecondChoices) {
  Layout l{"moe_mixed", {}, 2};
  l.choices = 2;
  l.renormalize = true;
  l.aux_kinds = {AuxKind::kGShard};
  l.with_form().kind = RouterKind::kGShard;
  for (const double factor : {0.0, 1.0}) {
    l.with_form().capacity_factor = factor;
    expect_same_on_all(l);
  }
  Layout all = l;
  all.form = {};
  EXPECT_NE(one_rank(l).losses.front(), one_rank(all).losses.front());
}

// Noise, whose scales are learnt, with its own two terms: the scales' weights are gathered from all ranks as well.
TEST(Routers, NoiseImportanceAndLoad) {
  Layout l{"moe_mixed", {}, 2};
  l.with_form().kind = RouterKind::kNoisy;
  l.aux_kinds = {AuxKind::kImportance, AuxKind::kLoad};
  l.aux_loss = 0.05;
  expect_same_on_all(l);
  const Outcome& one = one_rank(l);
  std::size_t learnt = 0;
  for (const auto& [name, gradient] : one.gradients)
    if (name.ends_with("moe.noise_ED"))
      learnt += std::any_of(gradient.begin(), gradient.end(), [](float g) { return g != 0; });
  EXPECT_EQ(learnt, one.loads.front().size()) << "of every mixture";
  EXPECT_GT(one.auxes.front(), 0);
  Layout without = l;
  without.aux_kinds = {AuxKind::kImportance};
  EXPECT_NE(one.norms.front(), one_rank(without).norms.front()) << "the load has a gradient";
  without.form = {};
  EXPECT_NE(one_rank(without).losses.front(), one.losses.front()) << "noise chooses";
}

Layout in_groups_of_two(RouterKind kind) {
  Layout l{"moe_mixed", {}, 2};
  l.aux_loss = 0;
  l.eps = kEps;
  l.with_form().kind = kind;
  l.with_form().group_size = 2;
  return l;
}

// A term without a coefficient is none: it asks nothing of routers that have no such sums, and changes no bit.
TEST(Routers, TermsWithoutACoefficient) {
  const auto with = [](Layout l, const std::vector<AuxKind>& kinds, const std::vector<double>& coefficients) {
    l.steps = 2;
    l.change = [=](RunConfig& run) {
      run.router.aux_kind = kinds;
      run.router.aux_loss = coefficients;
    };
    return run_in_layout(l);
  };
  const auto expect_same_bits = [](const Outcome& one, const Outcome& other) {
    EXPECT_EQ(one.losses, other.losses);
    EXPECT_EQ(one.norms, other.norms);
    EXPECT_EQ(one.gradients, other.gradients);
    EXPECT_EQ(one.weights, other.weights);
  };
  // Of experts that choose, most slots are none: there is no sum of an expert's weights.
  const Layout choosing = in_groups_of_two(RouterKind::kExpertChoice);
  expect_same_bits(with(choosing, {AuxKind::kHf}, {0}), with(choosing, {AuxKind::kImportance}, {0}));
  // Without noise nobody counts chances: what lies in their place would be read.
  const Layout plain{"moe_mixed", {}, 2};
  const Outcome alone = with(plain, {AuxKind::kHf}, {0.1}),
                beside = with(plain, {AuxKind::kHf, AuxKind::kLoad}, {0.1, 0});
  expect_same_bits(alone, beside);
  EXPECT_EQ(alone.auxes, beside.auxes);
}

// Where the two tokens of a group lie on two tp ranks, or on one; and where rows go by way of nodes.
TEST(Routers, ExpertsThatChooseTokens) {
  for (const double factor : {0.0, 8.0}) {  // one token of a group, or both
    Layout l = in_groups_of_two(RouterKind::kExpertChoice);
    l.with_form().capacity_factor = factor;
    l.z_loss = 0.01;
    expect_same_on_all(l);
    for (const auto& layer : one_rank(l).loads.front())
      for (const double share : layer) EXPECT_EQ(share, layer.front()) << "every expert takes as many";
  }
  Layout l = in_groups_of_two(RouterKind::kExpertChoice);
  l.with_form().jitter = 0.1;
  expect_same_on_all(l);
  l.mesh = {1, 2, 1, 2, 4, 1};
  l.node_ranks = 2;
  expect_equal(one_rank(l), run_in_layout(l));
}
TEST(Routers, TokensInMixtures) {
  Layout l = in_groups_of_two(RouterKind::kMixtureOfTokens);
  l.with_form().temperature = 0.5;
  expect_same_on_all(l);
  Layout warm = l;
  warm.with_form().temperature = 1;
  EXPECT_NE(one_rank(l).losses.front(), one_rank(warm).losses.front());
  l.mesh = {1, 2, 1, 2, 4, 1};
  l.node_ranks = 2;
  expect_equal(one_rank(l), run_in_layout(l));
}

// Every kind of router where a rank has no expert, and where a whole node has none.
TEST(Routers, OfMoreRanksThanExperts) {
  for (const auto& router : kNames<RouterKind>.built) {
    Layout l = test::of_three_experts({});
    l.micro_batch = 2;
    l.eps = kEps;
    l.with_form().kind = router.value;
    if (router.value == RouterKind::kSwitch) l.choices = 1;
    if (router.value == RouterKind::kGShard) l.renormalize = true;
    if (l.own_form().routes_groups()) {
      l.aux_loss = 0;
      l.with_form().group_size = 2;
    } else {
      l.with_form().capacity_factor = 1;
    }
    for (const auto& [mesh, node_ranks] : {std::pair{MeshSpec{1, 2, 1, 2, 4, 1}, 0},
                                           {MeshSpec{1, 2, 1, 2, 4, 1}, 1},
                                           {MeshSpec{2, 1, 2, 2, 4, 1}, 0}}) {
      l.mesh = mesh;
      l.node_ranks = node_ranks;
      SCOPED_TRACE(fmt::format("{}, {}, nodes of {}", router.name, l.str(), node_ranks));
      expect_equal(one_rank(l), run_in_layout(l));
    }
  }
}

// Groups are of the configuration, not of the micro-batch; and what is computed again is grouped as before.
TEST(Routers, GroupsAreThoseOfAnyMicroBatchAndOfRecomputation) {
  for (const RouterKind kind : {RouterKind::kExpertChoice, RouterKind::kMixtureOfTokens}) {
    Layout l = in_groups_of_two(kind);
    const Outcome& two = one_rank(l);
    l.micro_batch = 4;
    expect_equal(two, one_rank(l));
    l.micro_batch = 2;
    for (const auto& [recompute, name] : kNames<Recompute>.built) {
      l.recompute = recompute;
      const Outcome& again = one_rank(l);
      EXPECT_EQ(two.losses, again.losses) << name;
      EXPECT_EQ(two.norms, again.norms) << name;
    }
  }
}

// A capacity that holds all choices drops none, to the bit.
TEST(Routers, RoomForAllIsNoLimit) {
  Layout l{"moe_mixed", {}, 2};
  const Outcome& all = one_rank(l);
  l.with_form().capacity_factor = 1000;
  const Outcome& limited = one_rank(l);
  EXPECT_EQ(all.losses, limited.losses);
  EXPECT_EQ(all.norms, limited.norms);
  EXPECT_EQ(limited.dropped, std::vector<double>(limited.dropped.size(), 0.0));
}

TEST(Routers, JitterAndCapacityOfSigmoidScores) {
  Layout l{"moe_mixed", {}, 2};
  l.with_form().score = RouterScore::kSigmoid;
  l.with_form().jitter = 0.1;
  l.with_form().capacity_factor = 1.0;
  expect_same_on_all(l);
  Layout still = l;
  still.with_form().jitter = 0;
  EXPECT_NE(one_rank(l).losses.front(), one_rank(still).losses.front());
}

// A token's number is that of the whole run, whatever micro-batch it lies in: without terms of a micro-batch, its size
// changes nothing.
TEST(Routers, MicroBatchesOfAnySizeDrawTheSame) {
  Layout l{"moe_mixed", {}, 1};
  l.aux_kinds = {AuxKind::kSequence};
  l.with_form().jitter = 0.2;
  l.with_form().capacity_factor = 0.75;
  const Outcome one = run_in_layout(l);
  l.micro_batch = 2;
  const Outcome two = run_in_layout(l);
  expect_equal(one, two);
  EXPECT_EQ(one.dropped.front(), two.dropped.front());
}

// Recomputation draws and drops what forward did.
TEST(Routers, RecomputationDrawsTheSame) {
  for (const auto& policy : kNames<Recompute>.built) {
    Layout l{"moe_mixed", {}, 2};
    l.with_form().jitter = 0.1;
    l.with_form().capacity_factor = 0.75;
    const Outcome& kept = one_rank(l);
    l.recompute = policy.value;
    const Outcome& again = one_rank(l);
    EXPECT_EQ(kept.losses, again.losses) << policy.name;
    EXPECT_EQ(kept.norms, again.norms) << policy.name;
    EXPECT_EQ(kept.dropped, again.dropped) << policy.name;
  }
}

}  // namespace
}  // namespace upmoe
