// Groups of parameters with a rate and a decay of their own: what they hold, and what a step makes of them.

#include "trainer/optimizer_groups.h"

#include <gmock/gmock.h>

#include "tests/support/layout_outcomes.h"
#include "tests/support/tiny_moe.h"
#include "trainer/schedule.h"

namespace upmoe::test {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

std::string refusal(const std::vector<OptimizerGroup>& groups) {
  try {
    optimizer_groups(groups, tiny_moe_config());
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ExitCode::kUsage);
    return e.what();
  }
  return "";
}

TEST(OptimizerGroups, TheFirstThatCatchesCounts) {
  const auto groups =
      optimizer_groups({{{"@router"}, 0.1, {}}, {{"layers.0.moe.*"}, {}, 0.0}}, tiny_moe_config());
  ASSERT_EQ(groups.size(), 2u);
  EXPECT_THAT(groups[0].names, ElementsAre("layers.0.moe.router_ED", "layers.1.moe.router_ED"));
  EXPECT_FALSE(groups[0].weight_decay.has_value());
  EXPECT_THAT(groups[1].names, ElementsAre("layers.0.moe.gate_up_EF2D", "layers.0.moe.down_EDF"));
  EXPECT_EQ(groups[1].weight_decay, 0.0);
}

TEST(OptimizerGroups, Refusals) {
  EXPECT_THAT(refusal({{{"@router"}, 0.1, {}}, {{"*moe.router_ED"}, 0.2, {}}}),
              HasSubstr("optimizer.groups[1]: all its parameters are in groups before it"));
  EXPECT_THAT(refusal({{{"*router_DE"}, 0.1, {}}}),
              HasSubstr("optimizer.groups[0]: pattern '*router_DE' matches no"));
  EXPECT_THAT(refusal({{{"*mlp.experts.1.*"}, 0.1, {}}}), HasSubstr("only a part of"));
}

// A rate that nothing would have is refused, not left without effect; a group of which a part trains is well.
TEST(OptimizerGroups, OfFrozenParameters) {
  const std::vector<OptimizerGroup> router{{{"@router"}, 0.1, {}}};
  const std::vector<std::string> first{"layers.0.moe.router_ED"},
      both{"layers.0.moe.router_ED", "layers.1.moe.router_ED"};
  EXPECT_EQ(optimizer_groups(router, tiny_moe_config(), first).size(), 1u);
  try {
    optimizer_groups(router, tiny_moe_config(), both);
    ADD_FAILURE() << "a group of frozen parameters";
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ExitCode::kUsage);
    EXPECT_THAT(e.what(), HasSubstr("optimizer.groups[0]: none of its parameters trains"));
  }
}

TEST(OptimizerGroups, FollowTheSchedule) {
  RunConfig run;
  run.optimizer.lr = 2.0;
  run.optimizer.groups = {{{"a"}, 0.5, {}}, {{"b"}, {}, 0.0}, {{"c"}, 0.0, {}}};
  run.schedule = {ScheduleKind::kCosine, 10, 0.1, 0.1};
  run.train.steps = 100;
  for (const std::int64_t step : {1, 5, 10, 40, 100}) {
    const std::vector<double> rates = learning_rates(run, step);
    ASSERT_EQ(rates.size(), 4u);
    EXPECT_EQ(rates[0], learning_rate(run, step));
    EXPECT_NEAR(rates[1], 0.25 * rates[0], 1e-15);
    EXPECT_EQ(rates[2], rates[0]);
    EXPECT_EQ(rates[3], 0.0);
  }
}

Tensors weights_after_a_step(MeshSpec mesh, const std::vector<OptimizerGroup>& groups,
                             const std::function<void(RunConfig&)>& change = {}) {
  Layout l{"moe_a27b", mesh, 1};
  l.steps = 1;
  l.change = [&](RunConfig& run) {
    run.optimizer.groups = groups;
    if (change) change(run);
  };
  return run_in_layout(l).weights;
}

// After one step, which every group begins with the same gradients: each parameter is what a run with its group's rate
// and decay for everything makes of it, to the bit, and the others are what they are without groups.
TEST(OptimizerGroups, AStepOfEachIsThatOfARunOfItsOwn) {
  const double lr = 0.37e-2, decay = 0.5;
  const auto router = [](const std::string& name) { return name.ends_with("moe.router_ED"); };
  const auto down = [](const std::string& name) { return name.ends_with("moe.down_EDF"); };
  for (const MeshSpec& mesh : {MeshSpec{}, MeshSpec{1, 2, 1, 1, 2, 1}}) {
    const Tensors grouped =
        weights_after_a_step(mesh, {{{"@router"}, lr, {}}, {{"*moe.down_EDF"}, {}, decay}});
    const Tensors plain = weights_after_a_step(mesh, {}),
                  fast = weights_after_a_step(mesh, {}, [&](RunConfig&run) { run.optimizer.lr = lr; }),
                  decayed = weights_after_a_step(mesh, {},
                                                 [&](RunConfig&run) { run.optimizer.weight_decay = decay; });
    for (const auto& [name, weights] : grouped) {
      EXPECT_EQ(weights, (router(name) ? fast : down(name) ? decayed : plain).at(name)) << name;
      if (router(name) || down(name)) {
        EXPECT_NE(weights, plain.at(name)) << name;
      }
    }
  }
}

// A group's decay is of matrices alone, as the other parameters' is.
TEST(OptimizerGroups, NormsDoNotDecay) {
  const Tensors plain = weights_after_a_step({}, {}),
                grouped = weights_after_a_step({}, {{{"*norm*", "@non_experts"}, {}, 0.5}});
  for (const auto& [name, weights] : grouped) {
    const bool same = name.find("norm") != std::string::npos ||
                      name.find("moe.gate_up") != std::string::npos ||
                      name.find("moe.down") != std::string::npos || name.ends_with("_NH");
    EXPECT_EQ(weights == plain.at(name), same) << name;
  }
}

}  // namespace
}  // namespace upmoe::test
