// A model on a rank: what it refuses, and that a model without gradients is one.

#include "trainer/rank_model.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "parallel/dry_comm.h"
#include "parallel/self_comm.h"
#include "tests/support/tiny_moe.h"

namespace upmoe {
namespace {

constexpr Device kDry{DeviceType::kDry, 0};

void expect_refused(const MeshSpec& spec, const RankModel::Options& options, const char* words) {
  const std::unique_ptr<Communicator> world = make_dry_communicator(0, 2);
  try {
    const RankModel model(test::tiny_moe_config(), spec, *world, kDry, options);
    FAIL() << "not refused: " << words;
  } catch (const Error& e) {
    EXPECT_THAT(e.what(), testing::HasSubstr(words));
  }
}

TEST(RankModel, RefusesAMeshOfOtherRanks) {
  expect_refused({.dp = 3}, {}, "is 3 ranks, 2 were started");
  expect_refused({.dp = 2, .ep = 3}, {}, "does not divide");
}

TEST(RankModel, RefusesAPlanThatIsNotTheMeshs) {
  const int blocks = test::tiny_moe_config().num_hidden_layers;
  expect_refused({.pp = 2}, {}, "a plan of 1 stages for a mesh of pp 2");
  expect_refused({.dp = 2}, {.plan = StagePlan{2, {{0, 1}, {1, blocks}}, {}}}, "a plan of 2 stages");
  expect_refused({.dp = 2}, {.plan = one_stage(blocks + 1)}, "other than");
  expect_refused({.dp = 2}, {.plan = StagePlan{1, {}, {}}}, "other than");
}

TEST(RankModel, RefusesStorageThatCannotBe) {
  expect_refused({.dp = 2}, {.dtype = DType::kF32, .grad_dtype = DType::kBF16}, "gradients in bf16");
  expect_refused({.dp = 2}, {.freeze = {"no such parameter"}}, "1 names to freeze");
  expect_refused({.dp = 2, .ep = 2}, {.node_ranks = 3}, "nodes of 3 ranks");
}

// A trait of a model that no layer here computes ends the run in words; it is not left out.
TEST(RankModel, RefusesAModelOfLayersThatAreMissing) {
  const std::unique_ptr<Communicator> self = make_self_communicator();
  const auto refused = [&](void (*ask)(ModelConfig&), const char* words) {
    ModelConfig config = test::tiny_moe_config();
    ask(config);
    try {
      const RankModel model(config, {}, *self, kDry, {});
      FAIL() << "not refused: " << words;
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ExitCode::kUsage);
      EXPECT_THAT(e.what(), testing::HasSubstr(words));
    }
  };
  refused([](ModelConfig& c) { c.activation = Activation::kGeluTanh; }, "activation = gelu_tanh in experts");
}

// sqrt(3072) = 55.4256 as a number of the embedding's dtype.
TEST(RankModel, RoundsTheScaleOfAnEmbedding) {
  const std::unique_ptr<Communicator> self = make_self_communicator();
  ModelConfig config = test::tiny_moe_config();
  config.hidden_size = 3072;
  const auto scale = [&](DType dtype) {
    return RankModel(config, {}, *self, kDry, {.dtype = dtype}).chunks.front().embedding->scale;
  };
  EXPECT_EQ(scale(DType::kBF16), 1.0f) << "not asked for";
  config.scaled_embedding = true;
  EXPECT_EQ(scale(DType::kBF16), 55.5f);
  EXPECT_EQ(scale(DType::kF32), std::sqrt(3072.0f));
}

TEST(RankModel, HasWhatItWasAskedFor) {
  const std::unique_ptr<Communicator> world = make_dry_communicator(3, 4);
  const ModelConfig config = test::tiny_moe_config();
  const StagePlan plan{2, {{0, 1}, {1, config.num_hidden_layers}}, {}};
  const RankModel model(config, {.pp = 2, .dp = 2, .ep = 2}, *world, kDry,
                        {.dtype = DType::kBF16, .recompute = Recompute::kBlock, .plan = plan});
  EXPECT_EQ(model.mesh.coord(Axis::kPp), 1);
  ASSERT_EQ(model.chunks.size(), 1u);
  const Transformer& chunk = model.chunks.front();
  EXPECT_EQ(chunk.first_block, 1);
  EXPECT_FALSE(chunk.embedding.has_value());
  EXPECT_TRUE(chunk.output.has_value());
  EXPECT_EQ(chunk.dtype, DType::kBF16);
  EXPECT_EQ(chunk.blocks.front().recompute, Recompute::kBlock);
  EXPECT_GT(model.params.gradient_bytes(), model.params.value_bytes());  // fp32 beside bf16
}

TEST(RankModel, WithoutGradientsHasNoMemoryForThem) {
  const std::unique_ptr<Communicator> self = make_self_communicator();
  const RankModel model(test::tiny_moe_config(), {}, *self, {}, {.gradients = false});
  EXPECT_EQ(model.params.gradient_bytes(), 0u);
  for (const StoredParam& p : model.params.all()) EXPECT_FALSE(p.grad.given()) << p.spec.name;
}

}  // namespace
}  // namespace upmoe
