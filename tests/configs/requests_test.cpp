// What was asked for and what will happen: nothing is dropped in silence.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "configs/config_diff.h"
#include "configs/model_config.h"
#include "configs/nearest_name.h"
#include "configs/run_config.h"
#include "configs/run_notes.h"
#include "configs/upcycle_config.h"

namespace upmoe {
namespace {

using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr const char* kMinimal = R"(run: {dir: runs/x}
model: {path: models/m}
data: {train: a.h5, seq_len: 64}
train: {steps: 100, global_batch: 8, micro_batch: 2}
)";

RunConfig run_with(const std::vector<std::string>& overrides) {
  return parse_run_config(kMinimal, "r.yaml", overrides);
}

TEST(Requests, AKeyWithoutEffectIsSaid) {
  EXPECT_THAT(run_with({}).notes, IsEmpty());
  for (const char* idle : {"schedule.decay_fraction=0.2", "train.eval_every=5", "train.eval_sequences=5"})
    EXPECT_THAT(run_with({idle}).notes, ElementsAre(HasSubstr("has no effect"))) << idle;
  EXPECT_THAT(run_with({"schedule.name=constant", "schedule.min_lr_ratio=0.5"}).notes,
              ElementsAre(HasSubstr("schedule.min_lr_ratio: 0.5 has no effect")));
  EXPECT_THAT(run_with({"data.shuffle=false", "data.seed=9"}).notes, ElementsAre(HasSubstr("data.seed")));
  EXPECT_THAT(run_with({"device=cpu", "optimizer.offload=true"}).notes,
              ElementsAre(HasSubstr("optimizer.offload")));
  EXPECT_THAT(run_with({"data.valid=v.h5", "train.eval_every=5"}).notes, IsEmpty());
  // The resolved configuration names every key, and that is no request.
  EXPECT_THAT(parse_run_config(to_yaml(run_with({})), "again", {}).notes, IsEmpty());
  EXPECT_THAT(without_effect(run_with({"router.z_loss=0.1"}), ModelConfig{}),
              ElementsAre(HasSubstr("router.z_loss: 0.1 has no effect")));
  EXPECT_THAT(without_effect(run_with({"run.seed=7"}), ModelConfig{}), ElementsAre(HasSubstr("run.seed")));
  ModelConfig mixture;  // of a checkpoint, of which the run says nothing
  mixture.num_experts = mixture.num_hidden_layers = 1;
  mixture.router.jitter = 0.1;
  EXPECT_THAT(without_effect(run_with({"run.seed=7"}), mixture), IsEmpty());
  // A teacher has the run's dtype of routers and its kernels.
  RunConfig taught = run_with({"kernels.experts=streams", "train.precision=bf16", "router.dtype=fp32"});
  EXPECT_THAT(without_effect(taught, ModelConfig{}),
              ElementsAre(HasSubstr("router.dtype"), HasSubstr("kernels.experts")));
  taught.train.teacher.config = std::make_shared<const ModelConfig>(mixture);
  EXPECT_THAT(without_effect(taught, ModelConfig{}), IsEmpty());
  EXPECT_THAT(run_with({"router.dtype=fp32", "train.precision=fp32"}).notes,
              ElementsAre(HasSubstr("router.dtype: fp32 has no effect")));
  EXPECT_THAT(run_with({"router.dtype=fp32", "train.precision=bf16"}).notes, IsEmpty());
}

TEST(Requests, RanksWithoutExpertsAreSaid) {
  ModelConfig mixture;
  mixture.num_experts = 3;
  mixture.num_hidden_layers = 1;
  const auto said = [&](const char* ep) {
    return without_effect(run_with({ep, "model.init=random"}), mixture);
  };
  EXPECT_THAT(said("parallel.ep=3"), IsEmpty());
  EXPECT_THAT(
      said("parallel.ep=4"),
      ElementsAre(HasSubstr("parallel.ep: 4 ranks share 3 experts, so 1 of the 4 holds no routed expert "
                            "and waits")));
  EXPECT_THAT(said("parallel.ep=8"), ElementsAre(HasSubstr("so 5 of the 8 hold no routed expert and wait")));
  RunConfig taught = run_with({"parallel.ep=4"});
  ModelConfig wide = mixture;
  wide.num_experts = 8;
  taught.train.teacher.config = std::make_shared<const ModelConfig>(mixture);
  EXPECT_THAT(words_of_ranks_without_experts(taught, wide),
              ElementsAre(HasSubstr("train.teacher: parallel.ep: 4 ranks share 3 experts")));
}

TEST(Requests, OverridesGivenTwiceAreSaid) {
  const RunConfig run = run_with({"train.steps=7", "train.steps=9"});
  EXPECT_EQ(run.train.steps, 9);
  EXPECT_THAT(run.notes, ElementsAre("train.steps is given twice on the command line; 9 counts, not 7"));
}

TEST(Requests, ATryShorterThanTheWarmUpRuns) {
  EXPECT_THAT(run_with({"schedule.warmup=101"}).notes, ElementsAre(HasSubstr("only rises")));
  EXPECT_THAT(run_with({"schedule.name=wsd", "schedule.warmup=60", "schedule.decay_fraction=0.5"}).notes,
              ElementsAre(HasSubstr("reaches into the warm-up")));
}

TEST(Requests, EveryChangedKeyIsFound) {
  const RunConfig before = run_with({"freeze=[a]"});
  EXPECT_THAT(changes_between(before, run_with({"freeze=[a]"})), IsEmpty());
  const std::vector<std::pair<std::string, std::string>> others{
      {"run.dir", "y"},           {"run.seed", "2"},
      {"model.path", "m2"},       {"model.init", "random"},
      {"router.aux_loss", "0.5"}, {"data.train", "b.h5"},
      {"data.seq_len", "32"},     {"data.shuffle", "false"},
      {"train.steps", "7"},       {"train.precision", "bf16"},
      {"optimizer.lr", "1"},      {"optimizer.clip", "0"},
      {"schedule.name", "wsd"},   {"schedule.warmup", "3"},
      {"parallel.ep", "2"},       {"freeze", "[b]"},
      {"checkpoint.keep", "5"},   {"log.every", "2"},
      {"device", "cpu"}};
  for (const auto& [key, value] : others) {
    std::vector<std::string> overrides{"freeze=[a]"};
    overrides.push_back(key + "=" + value);
    const std::vector<ConfigChange> changes = changes_between(before, run_with(overrides));
    ASSERT_EQ(changes.size(), 1u) << key;
    EXPECT_EQ(changes[0].key, key);
    EXPECT_NE(changes[0].before, changes[0].after) << key;
  }
}

TEST(Requests, TheRecordOfAnotherProgramIsRead) {
  const RunConfig now = run_with({"optimizer.lr=0.5"});
  const RunConfig recorded =
      recorded_run_config("train: {steps: 3, unheard_of: 1}\noptimizer:\n  lr: 0.25\nnew: {a: 1}\n");
  EXPECT_EQ(recorded.train.steps, 3);
  EXPECT_EQ(recorded.optimizer.lr, 0.25);
  std::vector<std::string> lines;
  for (const ConfigChange& change : changes_between(recorded, now)) lines.push_back(change.str());
  EXPECT_THAT(lines, Contains("optimizer.lr: 0.25 -> 0.5"));
}

TEST(Requests, ARecipeKeyWithoutEffectIsSaid) {
  const auto recipe = [](const std::vector<std::string>& overrides) {
    return parse_upcycle_config(
               "target: {num_experts: 8, num_experts_per_tok: 2, moe_intermediate_size: 16}\n", "r.yaml",
               overrides)
        .notes;
  };
  EXPECT_THAT(recipe({}), IsEmpty());
  EXPECT_THAT(recipe({"experts.reinit_sets=per_matrix"}), ElementsAre(HasSubstr("experts.reinit is 0")));
  EXPECT_THAT(recipe({"experts.reinit_from=config"}), ElementsAre(HasSubstr("experts.reinit is 0")));
  EXPECT_THAT(recipe({"router.method=zero", "router.std=0.5"}), ElementsAre(HasSubstr("router.std")));
  EXPECT_THAT(recipe({"shared.scale=3"}), ElementsAre(HasSubstr("no shared expert")));
  EXPECT_THAT(recipe({"experts.reinit=0.5", "experts.reinit_sets=per_matrix"}), IsEmpty());
  EXPECT_THAT(recipe({"seed=1", "seed=2"}), ElementsAre(HasSubstr("given twice")));
}

TEST(Requests, TheNearestNameIsProposed) {
  EXPECT_THAT(nearest_names("trian", {"upcycle", "train", "eval"}), ElementsAre("train"));
  EXPECT_THAT(nearest_names("xyzzyxyzzy", {"upcycle", "train", "eval"}), IsEmpty());
}

}  // namespace
}  // namespace upmoe
