// What a model costs is what a step books, to the last digit: real steps of every kind of model, under every way of
// recomputing, and the sum over the ranks of meshes.

#include "trainer/cost/model_cost.h"

#include <gtest/gtest.h>

#include "parallel/self_comm.h"
#include "tests/support/full_size.h"
#include "tests/support/layout_run.h"
#include "tests/support/temporary_directory.h"
#include "trainer/cost/roofline.h"
#include "trainer/rehearsal.h"

namespace upmoe::test {
namespace {

// Of the first step of a golden run, on the CPU.
Cost real_step(const Golden& golden, Recompute recompute) {
  const TemporaryDirectory folder;
  RunConfig run = golden.run(folder.path() / "tokens.h5", 2, 1);
  run.train.recompute = recompute;
  const auto self = make_self_communicator();
  Session s(run, golden.config(), *self);
  s.params.load(s.memory.exec, golden.reader());
  s.optimizer.reset(s.memory.exec);
  s.open_data(0);
  const StepReport report = Trainer(s).step(1);
  const Cost cost = s.memory.ledger.total();
  EXPECT_EQ(report.flops_per_rank, cost.model_flops);
  EXPECT_EQ(report.computed_flops_per_rank, cost.model_flops + cost.model_again);
  return cost;
}

double tokens_of(const Golden& golden) {
  return static_cast<double>(golden.settings("unused", 1, 1).train.global_batch * golden.seq_len());
}

TEST(ModelCost, IsWhatARealStepBooks) {
  for (const std::string& name : golden_cases()) {
    const Golden golden(name);
    for (const auto& policy : kNames<Recompute>.built) {
      const Cost real = real_step(golden, policy.value);
      const ModelCost cost = model_cost(golden.config(), {golden.seq_len(), policy.value});
      EXPECT_GT(real.model_flops, 0);
      EXPECT_EQ(real.model_flops, cost.train_flops * tokens_of(golden)) << name << ' ' << policy.name;
      EXPECT_EQ(real.model_again, cost.again_flops * tokens_of(golden)) << name << ' ' << policy.name;
    }
  }
}

// The ledger against the formula that the header gives.
TEST(ModelCost, IsTwoFlopsPerWeightAndAttention) {
  for (const std::string& name : golden_cases()) {
    const Golden golden(name);
    const ModelConfig& c = golden.config();
    const ModelCost cost = model_cost(c, {golden.seq_len(), Recompute::kNone});
    double pairs = 0;  // of a sequence
    for (std::int64_t t = 1; t <= golden.seq_len(); ++t)
      pairs += static_cast<double>(c.sliding_window > 0 ? std::min(t, c.sliding_window) : t);
    const double attention = 4.0 * c.num_hidden_layers * pairs / static_cast<double>(golden.seq_len()) *
                             static_cast<double>(c.num_attention_heads * c.head_dim);
    EXPECT_DOUBLE_EQ(cost.forward_flops, 2.0 * static_cast<double>(cost.multiplied) + attention) << name;
    EXPECT_DOUBLE_EQ(cost.attention_flops, attention) << name;
    EXPECT_DOUBLE_EQ(cost.train_flops, 3 * cost.forward_flops) << name;
  }
}

// Experts that choose compute as many rows as tokens that choose, or as many as there are in a group; mixtures are two
// products more, of tokens and experts, and twice as many in backward.
TEST(ModelCost, CountsRowsOfGroups) {
  const Golden golden("moe_mixed");
  ModelConfig c = golden.config();
  const auto cost_of = [&] { return model_cost(c, {golden.seq_len(), Recompute::kNone}); };
  const double rest = cost_of().forward_flops - 2.0 * static_cast<double>(cost_of().multiplied);
  const std::int64_t expert = cost_of().multiplied_routed / c.num_experts_per_tok;  // all layers, one expert
  c.router.kind = RouterKind::kExpertChoice;
  c.router.group_size = 2;
  c.router.capacity_factor = c.num_experts;
  EXPECT_EQ(cost_of().multiplied_routed, expert * c.num_experts);
  EXPECT_DOUBLE_EQ(cost_of().forward_flops, 2.0 * static_cast<double>(cost_of().multiplied) + rest);
  c.router.capacity_factor = c.num_experts / 2.0;
  EXPECT_EQ(cost_of().multiplied_routed, expert * c.num_experts / 2);
  EXPECT_DOUBLE_EQ(cost_of().forward_flops, 2.0 * static_cast<double>(cost_of().multiplied) + rest);
  c.router.kind = RouterKind::kMixtureOfTokens;
  c.router.capacity_factor = 0;
  const ModelCost mixed = cost_of();
  const double mixing = 4.0 * c.num_moe_layers() * static_cast<double>(c.num_experts * c.hidden_size);
  EXPECT_EQ(mixed.multiplied_routed, expert * c.num_experts / 2);
  EXPECT_DOUBLE_EQ(mixed.forward_flops, 2.0 * static_cast<double>(mixed.multiplied) + rest + mixing);
  EXPECT_DOUBLE_EQ(mixed.train_flops, 3 * mixed.forward_flops);
  EXPECT_DOUBLE_EQ(mixed.attention_flops, rest) << "mixing is no attention";
}

// Adapters of queries, keys and values are one product, whose zeros are computed and are no attention's, however long
// the context of a token is.
TEST(ModelCost, AdaptersAreNoAttention) {
  const Golden golden("dense");
  ModelConfig c = golden.config();
  const ServedModel plain(c, 8);
  const double attention = model_cost(c, {golden.seq_len(), Recompute::kNone}).attention_flops;
  c.lora = {4, 8, {LoraTarget::kQuery, LoraTarget::kKey, LoraTarget::kValue}};
  const ModelCost cost = model_cost(c, {golden.seq_len(), Recompute::kNone});
  const double width = static_cast<double>((c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim),
               zeros = 2.0 * c.num_hidden_layers * 4 * (3 - 1) * width;
  EXPECT_EQ(cost.attention_flops, attention);
  EXPECT_DOUBLE_EQ(cost.forward_flops, 2.0 * static_cast<double>(cost.multiplied) + zeros + attention);
  EXPECT_EQ(ServedModel(c, 8).context_flops, plain.context_flops);
  EXPECT_GT(ServedModel(c, 8).token_flops, plain.token_flops);
}

// A whole block again: its forward without the head. Of the up-projections: two thirds of each network.
TEST(ModelCost, RecomputationIsBookedApart) {
  const Golden golden("dense");
  const ModelConfig& c = golden.config();
  const auto again = [&](Recompute r) { return model_cost(c, {golden.seq_len(), r}).again_flops; };
  const ModelCost none = model_cost(c, {golden.seq_len(), Recompute::kNone});
  EXPECT_EQ(none.again_flops, 0);
  EXPECT_EQ(again(Recompute::kNorms), 0) << "no products";
  EXPECT_EQ(again(Recompute::kSwiglu), 0) << "no products";
  EXPECT_EQ(again(Recompute::kElementwise), 0) << "no products";
  EXPECT_EQ(again(Recompute::kBlock),
            none.forward_flops - 2.0 * static_cast<double>(c.vocab_size * c.hidden_size));
  EXPECT_EQ(again(Recompute::kUp),
            4.0 * c.num_hidden_layers * static_cast<double>(c.hidden_size * c.intermediate_size));
}

// What ranks compute beside each other, such as the shared expert's gate under tp, is the model's once, and its other
// times are kept apart with what is computed again. That a rehearsed rank books what a real one books is
// rehearsal_test's.
TEST(ModelCost, IsTheSumOverTheRanksOfAMesh) {
  for (Layout layout : layouts_of_every_kind()) {
    const Golden golden(layout.model);
    const int ranks = layout.mesh.world();
    for (const auto& policy : kNames<Recompute>.built) {
      layout.recompute = policy.value;
      const RunConfig run = run_of(layout, golden, "unused");
      Cost sum;
      for (int rank = 0; rank < ranks; ++rank)
        sum += Rehearsal(run, golden.config(), rank, ranks).step().total();
      const ModelCost cost = model_cost(golden.config(), {golden.seq_len(), policy.value});
      const std::string where = fmt::format("{} {}", layout.str(), policy.name);
      EXPECT_DOUBLE_EQ(sum.model_flops, cost.train_flops * tokens_of(golden)) << where;
      if (layout.mesh.tp == 1)
        EXPECT_DOUBLE_EQ(sum.model_again, cost.again_flops * tokens_of(golden)) << where;
      else
        EXPECT_GE(sum.model_again, cost.again_flops * tokens_of(golden)) << where;
    }
  }
}

TEST(ModelCost, BytesAreWhatARankHolds) {
  const ModelCost cost = model_cost(full_size(), {16, Recompute::kNone});
  const auto parameters = static_cast<double>(cost.parameters.total);
  EXPECT_EQ(cost.weight_bytes(2), 2 * cost.parameters.total);
  EXPECT_NEAR(static_cast<double>(cost.adamw.total()) / parameters, 16,
              1e-3);  // with padding between tensors
  EXPECT_NEAR(static_cast<double>(cost.adamw8bit.total()) / parameters, 6, 0.05);
}

}  // namespace
}  // namespace upmoe::test
