// Run configurations: what is read, and what every wrong one is told.

#include "configs/run_config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "kernels/core/check.h"

namespace upmoe {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr const char* kMinimal = R"(run: {dir: runs/x}
model: {path: models/m}
data: {train: a.h5, seq_len: 64}
train: {steps: 100, global_batch: 8, micro_batch: 2}
)";

RunConfig parse(const std::string& yaml, const std::vector<std::string>& overrides = {}) {
  return parse_run_config(yaml, "r.yaml", overrides);
}

// The message; empty when the configuration is accepted.
std::string refusal(const std::string& yaml, const std::vector<std::string>& overrides = {}) {
  try {
    parse(yaml, overrides);
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ExitCode::kUsage);
    return e.what();
  }
  return "";
}
std::string added(const std::string& line) {
  return refusal(kMinimal + line + "\n");
}
std::string overridden(const std::string& assignment) {
  return refusal(kMinimal, {assignment});
}

TEST(RunConfig, DefaultsHold) {
  const RunConfig run = parse(kMinimal);
  EXPECT_EQ(run.origin, "r.yaml");
  ASSERT_EQ(run.data.train.size(), 1u);
  EXPECT_EQ(run.data.train[0].path, "a.h5");
  EXPECT_EQ(run.data.train[0].weight, 1.0);
  EXPECT_EQ(run.model.init, ModelInit::kWeights);
  EXPECT_EQ(run.optimizer.lr, 3e-4);
  EXPECT_EQ(run.parallel.zero, 1);
  EXPECT_EQ(run.device, DeviceChoice::kAuto);
}

TEST(RunConfig, TheExampleOfTheDocumentationIsRead) {
  const RunConfig run = parse(R"(
run:        {dir: runs/tiny, seed: 1}
model:      {path: models/tiny-moe, init: weights}   # a comment
router:     {aux_loss: 0.001, aux_kind: hf, z_loss: 0.0, bias_rate: 0.0, capacity_factor: 0.0}
data:       {train: [{path: train.h5, weight: 1.0}], valid: valid.h5, seq_len: 512, shuffle: true, mask_documents: false, seed: 1}
train:      {steps: 300, global_batch: 16, micro_batch: 4, precision: fp32}
optimizer:  {name: adamw, lr: 3.0e-4, beta1: 0.9, beta2: 0.95, eps: 1.0e-8, weight_decay: 0.1, clip: 1.0}
schedule:   {name: cosine, warmup: 20, min_lr_ratio: 0.1}
parallel:   {tp: 1, pp: 1, cp: 1, ep: 2, etp: 1, zero: 1}
freeze:     []
checkpoint: {every: 100, keep: 3, async: true}
log:        {every: 1, tensorboard: true}
device:     auto
)");
  ASSERT_EQ(run.data.valid.size(), 1u);
  EXPECT_EQ(run.data.valid[0].path, "valid.h5");
  EXPECT_EQ(run.data.valid[0].name, "");
  EXPECT_EQ(run.schedule.warmup, 20);
  EXPECT_EQ(run.parallel.ep, 2);
}

TEST(RunConfig, ShippedFilesAreRead) {
  int files = 0;
  for (const char* folder : {"configs", "configs/quickstart", "configs/finetune"})
    for (const auto& entry :
         std::filesystem::directory_iterator(std::filesystem::path(UPMOE_SOURCE_DIR) / folder)) {
      if (entry.path().extension() != ".yaml") continue;
      EXPECT_NO_THROW(read_run_config(entry.path(), {})) << entry.path();
      ++files;
    }
  EXPECT_EQ(files, 13 + 3 + 5);
}

TEST(RunConfig, Sources) {
  const auto read = [](const std::string& value) {
    return parse(kMinimal, {"data.train=" + value}).data.train;
  };
  const auto list = read("[{path: a.h5, weight: 2}, b.h5, {path: \"c d.h5\"}]");
  ASSERT_EQ(list.size(), 3u);
  EXPECT_EQ(list[0].weight, 2.0);
  EXPECT_EQ(list[1].path, "b.h5");
  EXPECT_EQ(list[2].path, "c d.h5");
  EXPECT_EQ(read("with: odd #name.h5").at(0).path, "with: odd #name.h5");
  const auto masked = read("[{path: a.h5, loss_mask: true}, b.h5]");
  EXPECT_TRUE(masked.at(0).loss_mask);
  EXPECT_FALSE(masked.at(1).loss_mask);
  RunConfig again = parse(kMinimal, {"data.train=[{path: a.h5, loss_mask: true}, b.h5]"});
  again = parse(to_yaml(again), {});
  EXPECT_TRUE(again.data.train.at(0).loss_mask && !again.data.train.at(1).loss_mask);
  EXPECT_THAT(overridden("data.train=[{path: a, loss_mask: 1}]"), HasSubstr("true or false"));
  EXPECT_THAT(overridden("data.train=[]"), HasSubstr("empty"));
  EXPECT_THAT(overridden("data.train=[{weight: 1}]"), HasSubstr("data.train[0]: path is missing"));
  EXPECT_THAT(overridden("data.train=[{path: a, weight: 0}]"), HasSubstr("above 0"));
  EXPECT_THAT(overridden("data.train=[{path: a, weight: -1}]"), HasSubstr("above 0"));
  EXPECT_THAT(overridden("data.train=[{path: a, wieght: 1}]"), HasSubstr("wieght"));
  EXPECT_THAT(overridden("data.train=[[a]]"), HasSubstr("data.train[0]"));
  EXPECT_THAT(overridden("data.train=[a"), HasSubstr("not valid YAML"));
}

TEST(RunConfig, GroupsOfTheOptimizer) {
  const std::string words =
      "optimizer.groups=[{match: '@router', lr: 1.0e-5, weight_decay: 0}, {match: [a, 'b*'], lr: 0.5}]";
  const RunConfig again = parse(to_yaml(parse(kMinimal, {words})));
  const std::vector<OptimizerGroup>& groups = again.optimizer.groups;
  ASSERT_EQ(groups.size(), 2u);
  EXPECT_EQ(groups[0].match, std::vector<std::string>{"@router"});
  EXPECT_EQ(groups[0].lr, 1e-5);
  EXPECT_EQ(groups[0].weight_decay, 0.0);
  EXPECT_EQ(groups[1].match, (std::vector<std::string>{"a", "b*"}));
  EXPECT_FALSE(groups[1].weight_decay.has_value());
  EXPECT_THAT(overridden("optimizer.groups=[{lr: 1}]"), HasSubstr("optimizer.groups[0]: match is missing"));
  EXPECT_THAT(overridden("optimizer.groups=[{match: a, rate: 1}]"), HasSubstr("'optimizer.groups[0].rate'"));
  EXPECT_THAT(overridden("optimizer.groups=[{match: []}]"), HasSubstr("the list is empty"));
  EXPECT_THAT(overridden("optimizer.groups={match: a}"), HasSubstr("expected a list"));
}

TEST(RunConfig, UnknownKeysNameTheNearest) {
  EXPECT_EQ(added("optimizer: {learning_rate: 1}"),
            "r.yaml:5:13: unknown key 'optimizer.learning_rate'; valid here: name, lr, beta1, beta2, eps, "
            "weight_decay, clip, offload, groups");
  EXPECT_THAT(added("optimizer: {wieght_decay: 1}"), HasSubstr("did you mean optimizer.weight_decay?"));
  EXPECT_THAT(added("optimiser: {lr: 1}"),
              AllOf(HasSubstr("r.yaml:5:1"), HasSubstr("did you mean optimizer?")));
  EXPECT_THAT(added("schedule: {lr: 1}"), HasSubstr("did you mean optimizer.lr?"));
  EXPECT_THAT(added("steps: 5"), HasSubstr("did you mean train.steps?"));
  EXPECT_EQ(overridden("optimizer.bata1=0.9"),
            "command line: unknown key 'optimizer.bata1'; did you mean optimizer.beta1?");
  EXPECT_THAT(overridden("train=5"), HasSubstr("is a section"));
  EXPECT_THAT(overridden("nonsense"), HasSubstr("section.key=value"));
  EXPECT_THAT(overridden("=5"), HasSubstr("section.key=value"));
  EXPECT_THAT(added("router: 5"), HasSubstr("is a section"));
  EXPECT_THAT(added("router:"), HasSubstr("is a section"));
}

TEST(RunConfig, WrongTypes) {
  EXPECT_EQ(overridden("train.steps=abc"), "command line: train.steps: found 'abc', expected a whole number");
  for (const char* value : {"1.5", "300.0", "1_000", "0x10", "1e-1", "99999999999999999999", "", "--5", "+-5",
                            "1e300", "\"5\"", "[5]", "{a: 5}", "5 6", "nan"}) {
    EXPECT_THAT(overridden(std::string("train.steps=") + value), HasSubstr("train.steps")) << value;
  }
  EXPECT_THAT(overridden("train.steps=0777"), HasSubstr("octal"));
  EXPECT_EQ(parse(kMinimal, {"train.steps=1e4"}).train.steps, 10000);
  EXPECT_EQ(parse(kMinimal, {"train.steps=+12"}).train.steps, 12);
  for (const char* value :
       {".nan", "nan", ".inf", "inf", "-.inf", "1e999", "0x1p3", "abc", "1,5", "'1'", "007"}) {
    EXPECT_THAT(overridden(std::string("optimizer.lr=") + value), HasSubstr("optimizer.lr")) << value;
  }
  EXPECT_EQ(parse(kMinimal, {"optimizer.lr=1"}).optimizer.lr, 1.0);
  EXPECT_EQ(parse(kMinimal, {"optimizer.lr=.5e-3"}).optimizer.lr, 0.5e-3);
  for (const char* value : {"yes", "on", "1", "True", "'true'"}) {
    EXPECT_THAT(overridden(std::string("data.shuffle=") + value), HasSubstr("true or false")) << value;
  }
  EXPECT_THAT(added("log: {every: }"), HasSubstr("log.every: has no value"));
  EXPECT_THAT(added("freeze: embed_VD"), HasSubstr("list of texts"));
  EXPECT_THAT(overridden("run.dir="), HasSubstr("run.dir: is empty"));
  EXPECT_TRUE(parse(kMinimal, {"data.valid="}).data.valid.empty());
  EXPECT_THAT(parse(kMinimal, {"freeze=[embed_VD, 'layers.*.attn.*']"}).freeze,
              ElementsAre("embed_VD", "layers.*.attn.*"));
}

TEST(RunConfig, HeldOutSetsByName) {
  const RunConfig run = parse(kMinimal, {"data.valid={code: c.h5, prose-2: 'a b.h5'}"});
  ASSERT_EQ(run.data.valid.size(), 2u);
  EXPECT_EQ(run.data.valid[0].name, "code");
  EXPECT_EQ(run.data.valid[1].path, "a b.h5");
  const RunConfig again = parse_run_config(to_yaml(run), "again", {});
  ASSERT_EQ(again.data.valid.size(), 2u);
  EXPECT_EQ(again.data.valid[1].name, "prose-2");
  EXPECT_EQ(again.data.valid[1].path, "a b.h5");
  EXPECT_EQ(to_yaml(again), to_yaml(run));
  EXPECT_THAT(overridden("data.valid={}"), HasSubstr("names with their paths"));
  EXPECT_THAT(overridden("data.valid=[a.h5]"), HasSubstr("names with their paths"));
  EXPECT_THAT(overridden("data.valid={'a/b': c.h5}"), HasSubstr("no name of a set"));
  EXPECT_THAT(overridden("data.valid={a: }"), HasSubstr("data.valid.a"));
  EXPECT_THAT(overridden("data.valid={a: c.h5, a: d.h5}"), HasSubstr("given twice"));
}

TEST(RunConfig, ImpossibleValues) {
  for (const char* bad : {"optimizer.lr=-1",
                          "optimizer.beta1=1",
                          "optimizer.beta2=-0.1",
                          "optimizer.eps=0",
                          "optimizer.clip=-1",
                          "schedule.min_lr_ratio=1.1",
                          "schedule.decay_fraction=0",
                          "schedule.warmup=-1",
                          "schedule.name=linear",
                          "train.steps=0",
                          "train.global_batch=0",
                          "train.micro_batch=3",
                          "train.micro_batch=16",
                          "train.precision=fp16",
                          "train.recompute=all",
                          "train.eval_every=-1",
                          "train.nonfinite_patience=0",
                          "data.seq_len=0",
                          "data.seed=-1",
                          "checkpoint.keep=1",
                          "checkpoint.every=-1",
                          "checkpoint.keep_every=-1",
                          "log.every=0",
                          "parallel.ep=0",
                          "parallel.ep=3000000000",
                          "router.aux_loss=-0.1",
                          "router.aux_kind=none",
                          "model.init=zeros",
                          "device=gpu",
                          "data.seq_len=16777217",
                          "train.global_batch=1e10"}) {
    const std::string key = std::string(bad).substr(0, std::string(bad).find('='));
    EXPECT_THAT(overridden(bad), HasSubstr(key)) << bad;
  }
  EXPECT_THAT(overridden("train.micro_batch=3"), HasSubstr("does not divide train.global_batch = 8"));
  EXPECT_THAT(overridden("checkpoint.keep_every=1000001"),
              HasSubstr("is no multiple of checkpoint.every = "));
}

TEST(RunConfig, WhatIsNotBuiltSaysSo) {
  for (const char* planned : {"parallel.zero=3"}) {
    EXPECT_THAT(overridden(planned), HasSubstr("is not built yet")) << planned;
  }
  EXPECT_EQ(overridden("device=cuda"), "");  // the runtime knows whether there is one
}

TEST(RunConfig, AllProblemsAtOnce) {
  const std::string message = refusal("run: {seed: x}\ntrain: {steps: -1, stepz: 2}\n", {"optimizer.lr=no"});
  EXPECT_THAT(message, HasSubstr("r.yaml: 10 problems"));
  for (const char* part :
       {"r.yaml:1:13: run.seed", "r.yaml:2:16: train.steps", "'train.stepz'", "optimizer.lr",
        "run.dir is missing", "model.path is missing", "data.train is missing", "data.seq_len is missing",
        "train.global_batch is missing", "micro_batch is missing"}) {
    EXPECT_THAT(message, HasSubstr(part));
  }
  EXPECT_THAT(refusal("a: [1"),
              Not(HasSubstr("missing")));  // no follow-up problems of a file that is not YAML
  EXPECT_THAT(refusal(""), HasSubstr("empty"));
  EXPECT_THAT(refusal("just text"), HasSubstr("sections"));
}

TEST(RunConfig, OverridesWinAndTheLastOne) {
  const RunConfig run = parse(kMinimal, {"train.steps=7", "run.dir=/other dir/x=y", "train.steps=9"});
  EXPECT_EQ(run.train.steps, 9);
  EXPECT_EQ(run.run.dir, "/other dir/x=y");
  const std::string without =
      "run: {}\nmodel: {path: m}\ndata: {train: a, seq_len: 4}\n"
      "train: {steps: 1, global_batch: 1, micro_batch: 1}\n";
  EXPECT_THAT(refusal(without), HasSubstr("run.dir is missing"));
  EXPECT_EQ(refusal(without, {"run.dir=x"}), "");  // given on the command line alone
}

TEST(RunConfig, ToYamlReadsBack) {
  RunConfig run =
      parse(kMinimal, {"optimizer.lr=0.1e-5", "data.train=[{path: 'a: b', weight: 0.3}, {path: c}]",
                       "freeze=['*']", "run.dir=a#b \"c\"", "schedule.name=wsd", "parallel.ep=4"});
  run.optimizer.weight_decay = 1.0 / 3.0;
  const std::string yaml = to_yaml(run);
  const RunConfig again = parse(yaml);
  EXPECT_EQ(to_yaml(again), yaml);
  EXPECT_EQ(again.optimizer.weight_decay, run.optimizer.weight_decay);
  EXPECT_EQ(again.run.dir, run.run.dir);
  EXPECT_EQ(again.data.train.at(0).path, "a: b");
  EXPECT_EQ(again.data.train.at(0).weight, 0.3);
  EXPECT_THAT(again.freeze, ElementsAre("*"));
}

}  // namespace
}  // namespace upmoe
