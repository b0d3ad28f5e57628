// Upcycling recipes: the shipped files, and what wrong ones are told.

#include "configs/upcycle_config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <cmath>

#include "kernels/core/check.h"

namespace upmoe {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::UnorderedElementsAreArray;

constexpr const char* kMinimal =
    "target: {num_experts: 8, num_experts_per_tok: 2, moe_intermediate_size: 32}\n";

std::string refusal(const std::vector<std::string>& overrides, const std::string& yaml = kMinimal) {
  try {
    parse_upcycle_config(yaml, "u.yaml", overrides);
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ExitCode::kUsage);
    return e.what();
  }
  return "";
}

TEST(UpcycleConfig, ShippedRecipes) {
  std::vector<std::string> expected, found;
  for (const char* name : {"qwen1.5-moe-a2.7b",
                           "sparse-upcycling",
                           "virtual-group",
                           "drop-upcycling",
                           "llama-moe-split",
                           "from-scratch",
                           "mixtral-8x",
                           "deepseekmoe",
                           "qwen2-57b-a14b",
                           "arctic-residual",
                           "marco-nano",
                           "qwen3-30b-like",
                           "dots1-like",
                           "llama-moe-random",
                           "rnu",
                           "sparse-upcycling-half",
                           "apollo-last2",
                           "btx",
                           "grow-2x",
                           "btx-prompts",
                           "cmoe"}) {
    expected.push_back(name + std::string(".yaml"));
    expected.push_back(name + std::string("-tiny.yaml"));
  }
  for (const auto& entry : fs::directory_iterator(fs::path(UPMOE_SOURCE_DIR) / "configs/upcycle")) {
    found.push_back(entry.path().filename());
    const UpcycleConfig config = read_upcycle_config(entry.path(), {});
    const std::string yaml = to_yaml(config);
    EXPECT_EQ(to_yaml(parse_upcycle_config(yaml, "again", {})), yaml) << entry.path();
  }
  EXPECT_THAT(found, UnorderedElementsAreArray(expected));
}

// A tiny recipe differs from its model in widths, and where it says so in the router's spread, which goes
// with the root of the hidden size: 2048 there, 256 here.
TEST(UpcycleConfig, TinyTwinsAreTheSameRecipes) {
  const fs::path folder = fs::path(UPMOE_SOURCE_DIR) / "configs/upcycle";
  int twins = 0;
  for (const auto& entry : fs::directory_iterator(folder)) {
    const std::string stem = entry.path().stem();
    if (!stem.ends_with("-tiny")) continue;
    UpcycleConfig tiny = read_upcycle_config(entry.path(), {});
    const UpcycleConfig full = read_upcycle_config(folder / (stem.substr(0, stem.size() - 5) + ".yaml"), {});
    tiny.target.moe_intermediate_size = full.target.moe_intermediate_size;
    tiny.target.shared_expert_intermediate_size = full.target.shared_expert_intermediate_size;
    if (tiny.router.std != full.router.std) {
      EXPECT_NEAR(tiny.router.std, full.router.std * std::sqrt(2048.0 / 256.0), 1e-4) << stem;
      tiny.router.std = full.router.std;
    }
    EXPECT_EQ(to_yaml(tiny), to_yaml(full)) << stem;
    ++twins;
  }
  EXPECT_EQ(twins, 21);
}

TEST(UpcycleConfig, TheProjectsDefault) {
  const UpcycleConfig c =
      read_upcycle_config(fs::path(UPMOE_SOURCE_DIR) / "configs/upcycle/qwen1.5-moe-a2.7b.yaml", {"seed=7"});
  EXPECT_EQ(c.target.num_experts, 60);
  EXPECT_EQ(c.target.moe_intermediate_size, 1408);
  EXPECT_EQ(c.target.shared_expert_intermediate_size, 5632);
  EXPECT_EQ(c.experts.method, ExpertMethod::kShuffle);
  EXPECT_FALSE(c.experts.copies.has_value());
  EXPECT_FALSE(c.experts.scale.has_value());
  EXPECT_EQ(c.experts.reinit, 0.5);
  EXPECT_EQ(c.shared.method, SharedMethod::kDense);
  EXPECT_EQ(c.shared.scale, 2.0);
  EXPECT_TRUE(c.keep_rest);
  EXPECT_EQ(c.seed, 7);
}

TEST(UpcycleConfig, WithoutASharedWidthThereIsNoSharedExpert) {
  EXPECT_EQ(parse_upcycle_config(kMinimal, "u", {}).shared.method, SharedMethod::kNone);
  EXPECT_EQ(parse_upcycle_config(kMinimal, "u", {"target.shared_expert_intermediate_size=64"}).shared.method,
            SharedMethod::kDense);
}

TEST(UpcycleConfig, NumbersOrAuto) {
  const UpcycleConfig c = parse_upcycle_config(kMinimal, "u", {"experts.copies=16", "experts.scale=2.5"});
  EXPECT_EQ(c.experts.copies, 16);
  EXPECT_EQ(c.experts.scale, 2.5);
  EXPECT_EQ(parse_upcycle_config(to_yaml(c), "u", {"experts.scale=auto"}).experts.scale, std::nullopt);
  EXPECT_THAT(refusal({"experts.copies=automatic"}), HasSubstr("auto or a number"));
  EXPECT_THAT(refusal({"experts.copies=0"}), HasSubstr("found 0, expected 1 to"));
}

// A key that another one switches off says so.
TEST(UpcycleConfig, KeysWithoutEffectAreTold) {
  const auto notes = [](const std::vector<std::string>& overrides) {
    std::string all;
    for (const std::string& note : parse_upcycle_config(kMinimal, "u", overrides).notes) all += note + "\n";
    return all;
  };
  EXPECT_THAT(notes({"experts.split=random"}),
              HasSubstr("experts.split has no effect: experts.method is not"));
  EXPECT_EQ(notes({"experts.split=random", "experts.method=split"}), "");
  EXPECT_THAT(notes({"grow.noise=0.1"}), HasSubstr("grow.noise has no effect: grow.copies is 0"));
  EXPECT_THAT(notes({"grow.copies=2", "experts.reinit=0.5"}),
              HasSubstr("experts.reinit has no effect: grow"));
  EXPECT_THAT(notes({"experts.noise_share=0.5"}), HasSubstr("experts.noise is 0"));
  EXPECT_EQ(notes({"experts.noise_share=0.5", "experts.noise=0.1", "experts.reinit_sets=per_matrix"}), "");
  EXPECT_THAT(notes({"experts.reinit_stats=block"}), HasSubstr("experts.reinit is 0"));
  EXPECT_THAT(notes({"experts.reinit_stats=block", "experts.reinit=0.5", "experts.reinit_from=config"}),
              HasSubstr("experts.reinit_from is config"));
}

TEST(UpcycleConfig, LayersThatBecomeMixtures) {
  const auto dense = [](const std::string& layers) {
    return dense_layers(parse_upcycle_config(kMinimal, "u", {"target.layers=" + layers}).target.layers, 6);
  };
  using Layers = std::vector<int>;
  EXPECT_EQ(dense("all"), Layers{});
  EXPECT_EQ(dense("every:2"), (Layers{0, 2, 4}));
  EXPECT_EQ(dense("last:2"), (Layers{0, 1, 2, 3}));
  EXPECT_EQ(dense("first_dense:1"), Layers{0});
  EXPECT_EQ(dense("[4, 1]"), (Layers{0, 2, 3, 5}));
  for (const char* bad : {"every", "every:0", "every:x", "first:2", "[]", "[1, 1]", "[-1]", "2"})
    EXPECT_NE(refusal({std::string("target.layers=") + bad}), "") << bad;
  const auto problem = [](const std::string& layers) {
    return problem_of(parse_upcycle_config(kMinimal, "u", {"target.layers=" + layers}).target.layers, 6);
  };
  EXPECT_EQ(problem("last:6"), "");
  EXPECT_THAT(problem("last:7"), HasSubstr("beyond"));
  EXPECT_THAT(problem("[6]"), HasSubstr("beyond"));
  EXPECT_THAT(problem("every:7"), HasSubstr("leaves none"));
  EXPECT_THAT(problem("first_dense:6"), HasSubstr("leaves none"));
}

TEST(UpcycleConfig, TheFamilyIsAutoOrOneOfMixtures) {
  EXPECT_EQ(parse_upcycle_config(kMinimal, "u", {}).target.family, "");
  EXPECT_EQ(parse_upcycle_config(kMinimal, "u", {"target.family=mixtral"}).target.family, "mixtral");
  EXPECT_THAT(refusal({"target.family=qwen2"}), AllOf(HasSubstr("auto"), HasSubstr("qwen2_moe")));
}

TEST(UpcycleConfig, RefusesNonsense) {
  EXPECT_THAT(refusal({"target.num_experts_per_tok=9"}), HasSubstr("9 of 8 experts"));
  EXPECT_THAT(refusal({"shared.method=dense"}), HasSubstr("above 0"));
  EXPECT_THAT(refusal({"shared.method=none", "target.shared_expert_intermediate_size=64"}),
              HasSubstr("contradicts"));
  EXPECT_THAT(refusal({"router.method=virtual_group"}), HasSubstr("experts.method must be virtual_group"));
  EXPECT_EQ(refusal({"router.method=virtual_group", "experts.method=virtual_group"}), "");
  EXPECT_THAT(refusal({"experts.method=random", "experts.reinit=0.5"}), HasSubstr("every neuron already"));
  EXPECT_THAT(refusal({"experts.method=random", "experts.noise=0.5"}), HasSubstr("noise"));
  EXPECT_THAT(refusal({"experts.method=random", "experts.copies=2"}), HasSubstr("copies"));
  for (const char* bad :
       {"experts.reinit=1.5", "experts.reinit=-0.1", "experts.noise=-1", "router.std=-1", "router.std=.inf",
        "target.num_experts=0", "target.moe_intermediate_size=0", "seed=-1", "experts.reinit_from=target",
        "experts.reinit_sets=all", "experts.scale=-1", "experts.split=shuffled", "experts.noise_share=1.5",
        "experts.reinit_stats=expert"}) {
    EXPECT_NE(refusal({bad}), "") << bad;
  }
  EXPECT_THAT(refusal({}, "target: {num_expert: 8}\n"),
              testing::AllOf(HasSubstr("did you mean target.num_experts?"),
                             HasSubstr("num_experts_per_tok is missing")));
}

}  // namespace
}  // namespace upmoe
