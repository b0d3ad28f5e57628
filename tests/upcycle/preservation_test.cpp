// Which recipes leave the function of the dense FFN as it was, and which do not: the rows of the scale algebra.

#include <gtest/gtest.h>

#include <cmath>

#include "tests/support/tiny_dense.h"
#include "upcycle/layer_error.h"
#include "upcycle/mixture_shape.h"

namespace upmoe {
namespace {

using namespace test;

class Preservation : public ::testing::Test {
 protected:
  Preservation() {
    write_tiny_dense(dir_.path() / "dense", shape_);
    source_.emplace(dir_.path() / "dense");
  }

  // Virtual groups of 60 experts, nothing shared.
  static UpcycleConfig groups(RouterMethod router, bool renormalised) {
    UpcycleConfig c = tiny_recipe();
    c.experts.method = ExpertMethod::kVirtualGroup;
    c.target.norm_topk_prob = renormalised;
    c.target.shared_expert_intermediate_size = 0;
    c.shared.method = SharedMethod::kNone;
    c.router.method = router;
    c.router.std = 0.3;
    return c;
  }

  double error(const UpcycleConfig& config) const {
    return error(config, make_recipe(config, source_->config()));
  }

  // ||MoE(x) - FFN(x)|| / ||FFN(x)|| over random x and all layers.
  double error(const UpcycleConfig& config, const Recipe& recipe) const {
    const ModelConfig moe = make_moe_config(config, source_->config());
    const NaiveTensors dense = source_->tensors(), made = source_->make(recipe);
    double difference = 0, norm = 0;
    for (int layer = 0; layer < shape_.layers; ++layer) {
      for (int t = 0; t < 16; ++t) {
        std::vector<float> z(static_cast<std::size_t>(shape_.hidden));
        normal_batch(5, static_cast<std::uint64_t>(layer * 16 + t) * z.size(), shape_.hidden, z.data());
        const NaiveVector x(z.begin(), z.end());
        const NaiveVector expected =
            naive_ffn(dense, ffn_names(source_->config(), Role::kFfnGateUp, Role::kFfnDown, layer), x);
        const NaiveVector found = naive_moe(made, moe, layer, x);
        for (std::size_t d = 0; d < x.size(); ++d) {
          difference += (found[d] - expected[d]) * (found[d] - expected[d]);
          norm += expected[d] * expected[d];
        }
      }
    }
    return std::sqrt(difference / norm);
  }

  TinyShape shape_;
  TemporaryDirectory dir_;
  std::optional<TinySource> source_;
};

TEST_F(Preservation, A_ZeroRouterScaleN) {
  const UpcycleConfig c = groups(RouterMethod::kZero, false);
  EXPECT_NEAR(make_recipe(c, source_->config()).scale, 60, 1e-12);
  EXPECT_LT(error(c), kRoundedFactors);
}

TEST_F(Preservation, A2_ScaleSplitOverUpAndDown) {
  const UpcycleConfig c = groups(RouterMethod::kZero, false);
  Recipe r = make_recipe(c, source_->config());
  for (RecipeLine& line : r.lines) {
    if (auto* m = std::get_if<ExpertMatrix>(&line.transform); m != nullptr && m->matrix != FfnMatrix::kGate) {
      m->scale = std::sqrt(60.0);
    }
  }
  EXPECT_LT(error(c, r), kRoundedFactors);
}

TEST_F(Preservation, A3_CubeRootOnAllThreeIsNotExact) {
  const UpcycleConfig c = groups(RouterMethod::kZero, false);
  Recipe r = make_recipe(c, source_->config());
  for (RecipeLine& line : r.lines) {
    if (auto* m = std::get_if<ExpertMatrix>(&line.transform)) m->scale = std::cbrt(60.0);
  }
  EXPECT_GT(error(c, r), 0.1);
}

TEST_F(Preservation, B_VirtualGroupsRenormalised) {
  const UpcycleConfig c = groups(RouterMethod::kVirtualGroup, true);
  EXPECT_NEAR(make_recipe(c, source_->config()).scale, 4, 1e-12);
  EXPECT_LT(error(c), kRoundedFactors);
}

TEST_F(Preservation, C_VirtualGroupsNotRenormalisedAreNot) {
  UpcycleConfig c = groups(RouterMethod::kVirtualGroup, false);
  c.experts.scale = 60;
  EXPECT_GT(error(c), 0.1);
}

TEST_F(Preservation, D_IndependentRouterRowsAreNot) {
  UpcycleConfig c = groups(RouterMethod::kNormal, true);
  c.experts.scale = 4;
  EXPECT_GT(error(c), 0.1);
}

TEST_F(Preservation, E_SharedExpertCarriesTheFunction) {
  UpcycleConfig c = tiny_recipe();
  c.experts.scale = 0;
  c.router.std = 0.5;
  EXPECT_LT(error(c), kRoundedFactors);
  c.target.norm_topk_prob = true;
  EXPECT_LT(error(c), kRoundedFactors);
}

TEST_F(Preservation, F_SharedAndRoutedTakeAPartEach) {
  for (const double a : {0.0, 0.3, 1.0}) {
    UpcycleConfig c = groups(RouterMethod::kVirtualGroup, true);
    c.target.shared_expert_intermediate_size = 88;
    c.shared.method = SharedMethod::kDense;
    c.shared.scale = 2 * a;
    c.experts.scale = (1 - a) * 4;
    EXPECT_LT(error(c), kRoundedFactors) << a;
    c.target.norm_topk_prob = false;
    c.router.method = RouterMethod::kZero;
    c.experts.scale = (1 - a) * 60;
    EXPECT_LT(error(c), kRoundedFactors) << a;
  }
}

TEST_F(Preservation, WholeCopiesRenormalised) {
  UpcycleConfig c = groups(RouterMethod::kNormal, true);
  c.target.num_experts = 8;
  c.target.num_experts_per_tok = 2;
  c.target.moe_intermediate_size = 86;
  c.experts.method = ExpertMethod::kCopy;
  EXPECT_LT(error(c), kRoundedFactors);
}

// A split of the dense FFN of which every expert is chosen, whatever the order: the sum over the parts is the whole.
TEST_F(Preservation, AllPartsOfASplit) {
  for (const SplitOrder order : {SplitOrder::kConsecutive, SplitOrder::kRandom}) {
    UpcycleConfig c = groups(RouterMethod::kZero, true);
    c.target.num_experts = c.target.num_experts_per_tok = 2;
    c.target.moe_intermediate_size = 43;
    c.experts.method = ExpertMethod::kSplit;
    c.experts.split = order;
    EXPECT_NEAR(make_recipe(c, source_->config()).scale, 2, 1e-12);
    EXPECT_LT(error(c), kRoundedFactors);
    c.experts.scale = 1;
    EXPECT_NEAR(error(c), 0.5, kRoundedFactors);
  }
}

TEST_F(Preservation, TheDefaultRecipeStartsNearItsSource) {
  UpcycleConfig c = tiny_recipe();  // shared 2F, shuffled experts with half their neurons drawn anew
  c.experts.reinit = 0.5;
  c.router.std = 0.02;
  const double e = error(c);
  EXPECT_GT(e, 1e-3);
  EXPECT_LT(e, 0.1);
}

TEST_F(Preservation, TheReportsErrorAgrees) {
  UpcycleConfig c = groups(RouterMethod::kVirtualGroup, true);
  const auto reported = [&] {
    const Recipe r = make_recipe(c, source_->config());
    const PermutationCache permutations(r.seed, shape_.ffn);
    const FillContext context{source_->source, source_->survey, permutations, r.seed};
    return layer_error(r, 1, make_moe_config(c, source_->config()), context, 8);
  };
  const auto rounding = [&] { return rounding_of_layer(make_moe_config(c, source_->config())); };
  EXPECT_LT(reported(), rounding());
  c.experts.scale = 8;  // twice what preserves: off by the function itself
  EXPECT_NEAR(reported(), 1, 2 * rounding());
  c = tiny_recipe();
  c.experts.scale = 0;
  EXPECT_LT(reported(), rounding());
  c.shared.scale = 3;
  EXPECT_NEAR(reported(), 0.5, 1.5 * rounding());
}

}  // namespace
}  // namespace upmoe
