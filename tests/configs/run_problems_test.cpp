#include "configs/run_problems.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "configs/nearest_meshes.h"

namespace upmoe {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;

// 4 micro-batches of two sequences per step.
RunConfig run_with(const std::vector<std::string>& overrides) {
  return parse_run_config(R"(run: {dir: runs/x}
model: {path: models/m}
data: {train: a.h5, seq_len: 64}
train: {steps: 100, global_batch: 8, micro_batch: 2}
)",
                          "r.yaml", overrides);
}

ModelConfig six_experts() {
  ModelConfig moe;
  moe.model_type = "qwen2_moe";
  moe.vocab_size = moe.intermediate_size = 100;
  moe.num_hidden_layers = 2;
  moe.num_experts = 6;
  moe.num_experts_per_tok = 2;
  moe.moe_intermediate_size = 10;
  moe.shared_expert_intermediate_size = 20;
  moe.max_position_embeddings = 64;
  return moe;
}

TEST(RunProblems, RanksAndExperts) {
  RunConfig run = run_with({"parallel.ep=2"});  // 4 micro-batches per step
  const ModelConfig moe = six_experts();
  EXPECT_THAT(problems_of(run, moe, 2), IsEmpty());
  EXPECT_THAT(problems_of(run, moe, 4), IsEmpty());
  EXPECT_THAT(problems_of(run, moe, 3),
              ElementsAre("parallel.ep: 2 does not divide the 3 ranks of this run; possible: 1, 3"));
  EXPECT_THAT(problems_of(run, moe, 8),
              ElementsAre(AllOf(HasSubstr("at most 4 ranks"), HasSubstr("micro_batch 1"))));
  run.parallel.ep = 1;
  EXPECT_THAT(problems_of(run, moe, 3), IsEmpty());  // uneven shares of micro-batches are fine
  run.parallel.ep = 8;                               // two of them without experts, which is no problem
  EXPECT_THAT(problems_of(run, moe, 8), ElementsAre(HasSubstr("at most 4 ranks")));
  EXPECT_EQ(ranks_without_experts(run.parallel, moe), 2);
  run.train.micro_batch = 1;
  EXPECT_THAT(problems_of(run, moe, 8), IsEmpty());
  EXPECT_THAT(
      problems_of(run, moe, 12),
      ElementsAre(HasSubstr("8 does not divide the 12 ranks of this run; possible: 1, 2, 3, 4, 6, 12"),
                  HasSubstr("at most 8 ranks")));
  run.train.micro_batch = 2;
  run.parallel.ep = 6;
  EXPECT_EQ(ranks_without_experts(run.parallel, moe), 0);
  run.parallel.ep = 1;
  run.data.seq_len = 65;
  EXPECT_THAT(problems_of(run, moe, 1), ElementsAre(HasSubstr("max_position_embeddings = 64")));
  run.data.seq_len = 64;
  run.parallel.tp = 2;
  EXPECT_THAT(problems_of(run, moe, 3),
              ElementsAre(HasSubstr("tp 2 x pp 1 x cp 1 = 2 does not divide the 3")));
  run.parallel.tp = 1;
  run.parallel.ep = 2;
  ModelConfig dense = moe;
  dense.num_experts = 0;
  EXPECT_THAT(problems_of(run, dense, 2), ElementsAre(HasSubstr("has no expert layers")));
}

// Degrees of which each is a possible number, and whose product is 2^64.
TEST(RunProblems, DegreesWhoseProductPasses64Bits) {
  const RunConfig run = run_with({"parallel.tp=4194304", "parallel.pp=2097152", "parallel.cp=2097152"});
  EXPECT_THAT(problems_of(run, six_experts(), 4),
              ElementsAre(HasSubstr("tp 4194304 x pp 2097152 x cp 2097152 = 18446744073709551616 does not "
                                    "divide the 4 ranks")));
  EXPECT_THAT(nearest_meshes(run_with({"parallel.ep=2147483647"}), six_experts(), 4), Not(IsEmpty()));
}

// On GPUs alone: a device that is not chosen yet may be one.
TEST(RunProblems, MoreNodesThanAGpuTakes) {
  RunConfig run = run_with({"parallel.ep=130", "parallel.node_ranks=2", "train.global_batch=520"});
  const ModelConfig moe = six_experts();
  for (const DeviceChoice device : {DeviceChoice::kAuto, DeviceChoice::kCuda}) {
    run.device = device;
    EXPECT_THAT(problems_of(run, moe, 130),
                ElementsAre(AllOf(HasSubstr("parallel.node_ranks: 2 makes 65 nodes of parallel.ep = 130"),
                                  HasSubstr("at most 64; possible: 0, 5, 10, 13, 26, 65, 130; on CPUs say "
                                            "device: cpu"))));
  }
  run.device = DeviceChoice::kAuto;
  EXPECT_THAT(problems_of(on_device(run, {DeviceType::kCuda, 0}), moe, 130), Not(IsEmpty()));
  EXPECT_THAT(problems_of(on_device(run, {}), moe, 130), IsEmpty());
  run.device = DeviceChoice::kCpu;
  EXPECT_THAT(problems_of(run, moe, 130), IsEmpty());
  run.device = DeviceChoice::kCuda;
  for (const int possible : {0, 5, 130}) {
    run.parallel.node_ranks = possible;
    EXPECT_THAT(problems_of(run, moe, 130), IsEmpty()) << possible;
  }
  run.parallel.ep = 128;
  run.parallel.node_ranks = 2;
  EXPECT_THAT(problems_of(run, moe, 128), IsEmpty()) << "64 nodes";
}

TEST(RunProblems, NearestMeshes) {
  // 4 micro-batches of 64 tokens per step.
  RunConfig run = run_with({"parallel.ep=8", "parallel.tp=3"});
  ModelConfig moe = six_experts();
  moe.num_attention_heads = moe.num_key_value_heads = 4;
  const std::vector<std::string> near = nearest_meshes(run, moe, 8);
  ASSERT_THAT(near, testing::SizeIs(3));
  EXPECT_EQ(near.front(), "tp 4, pp 1, cp 1, ep 4, etp 1 (dp 2)");
  EXPECT_THAT(near, testing::Contains("tp 2, pp 1, cp 1, ep 4, etp 1 (dp 4)"));
  // Nearer than any of them is ep 8, which is possible, and leaves two ranks without experts.
  run.parallel.tp = 4;
  EXPECT_THAT(problems_of(run, moe, 8), IsEmpty());
  EXPECT_THAT(nearest_meshes(run, moe, 8), testing::Each(testing::Not(HasSubstr("ep 8"))));
  run.parallel.tp = 3;
  run.data.seq_len = 65;  // longer than the model takes, in any mesh
  EXPECT_THAT(nearest_meshes(run, moe, 8), IsEmpty());
}

struct Case {
  std::vector<std::string> overrides;
  int ranks;
  std::string problem;  // a part of the only one; empty: possible
};

TEST(RunProblems, MeshesOfAllAxes) {
  ModelConfig moe = six_experts();
  moe.intermediate_size = 30;
  moe.num_hidden_layers = 4;
  moe.num_attention_heads = 8;
  moe.num_key_value_heads = 2;
  const std::vector<Case> cases{
      {{"parallel.tp=2", "parallel.pp=2", "parallel.cp=2"}, 8, ""},
      {{"parallel.tp=8"}, 8, ""},  // two key/value heads on eight ranks: four hold each
      {{"parallel.tp=2", "parallel.ep=6", "parallel.pp=2"}, 12, ""},
      {{"parallel.tp=3", "data.seq_len=63"}, 3, "possible: 1, 2, 4, 8"},
      {{"parallel.tp=16"}, 16, "possible: 1, 2, 4, 8"},
      {{"parallel.tp=4", "data.seq_len=30"}, 4, "must be a multiple of 4"},
      {{"parallel.cp=2", "data.seq_len=30"}, 2, "use a multiple of 4"},
      {{"parallel.cp=2", "parallel.tp=2", "data.seq_len=36"}, 4, ""},
      {{"parallel.pp=5"}, 5, "for 4 layers"},
      {{"parallel.pp=2", "parallel.pp_chunks=3"}, 2, "for 4 layers"},
      {{"parallel.pp_chunks=2"}, 1, "without a pipeline"},
      {{"parallel.pp=2", "parallel.pp_chunks=2"}, 2, ""},
      {{"parallel.pp=2", "parallel.pp_chunks=2"}, 8, "in groups of pp = 2"},
      {{"parallel.etp=2", "parallel.ep=2"}, 4, ""},
      {{"parallel.etp=3"}, 4, "possible: 1, 2, 4"},
      {{"parallel.etp=2", "parallel.ep=4"}, 4, "that etp 2 leaves; possible: 1, 2"},
      {{"parallel.tp=2", "parallel.ep=4"}, 4, ""},    // ep spans tp ranks
      {{"parallel.tp=4", "parallel.ep=16"}, 16, ""},  // six experts on sixteen ranks
      {{"parallel.tp=2"}, 16, "use at most 8 ranks"},
  };
  for (const Case& c : cases) {
    const RunConfig run = run_with(c.overrides);
    const std::vector<std::string> found = problems_of(run, moe, c.ranks);
    if (c.problem.empty()) {
      EXPECT_THAT(found, IsEmpty()) << c.ranks << " ranks, " << c.overrides.front();
    } else {
      EXPECT_THAT(found, ElementsAre(HasSubstr(c.problem))) << c.ranks << " ranks, " << c.overrides.front();
    }
  }
}

}  // namespace
}  // namespace upmoe
