// What freezing a part of a model leaves as it was, and what it saves.

#include <fmt/ranges.h>
#include <gtest/gtest.h>

#include <cctype>

#include "tests/support/layout_outcomes.h"
#include "trainer/freeze.h"
#include "trainer/rehearsal.h"

namespace upmoe::test {
namespace {

const std::vector<std::string> kPresets{"@experts", "@non_experts", "@router", "@attention", "@shared"};

std::vector<Layout> frozen_layouts() {
  std::vector<Layout> all;
  for (const std::string& preset : kPresets) {
    all.push_back({"moe_a27b", {}, 2});
    all.back().freeze = {preset};
    all.push_back({"moe_a27b", {1, 2, 1, 2, 2, 1}, 1});
    all.back().freeze = {preset};
    all.push_back(all.back());
    all.back().recompute = Recompute::kSwiglu;
    all.back().zero = 2;
    all.push_back(all.back());
    all.back().recompute = Recompute::kUp;
  }
  all.push_back({"moe_mixed", {2, 1, 2, 2, 4, 1}, 1});
  all.back().freeze = {"@experts", "@router"};
  // Backward ends where nothing below trains: in the middle of a chunk, and before a stage's first block.
  for (const MeshSpec& mesh : {MeshSpec{}, MeshSpec{1, 2, 1, 2, 2, 1}, MeshSpec{2, 1, 1, 1, 1, 1}}) {
    all.push_back({"moe_a27b", mesh, 1});
    all.back().freeze = {"embed_VD", "layers.0.*"};
  }
  all.push_back({"moe_a27b", {1, 2, 1, 1, 2, 1}, 1});
  all.back().freeze = {"embed_VD", "layers.*"};
  return all;
}

class Frozen : public testing::TestWithParam<Layout> {};

// Every bit of what is frozen stays; gradients of the first step are those of a run that trains everything, to the bit:
// what else is computed, and in which order ranks are summed, does not depend on it.
TEST_P(Frozen, StaysAndChangesNoOtherGradient) {
  Layout l = GetParam();
  l.steps = 2;
  const Golden golden(l.model);
  const std::vector<std::string> frozen = frozen_names(l.freeze, golden.config());
  Outcome outcome;
  std::mutex mutex;
  std::map<std::string, std::int64_t> seen;
  run_in_threads(l.mesh.world(), [&](Communicator& world) {
    run_rank(world, golden, l, outcome, mutex, {}, [&](Session& s) {
      for (const StoredParam& p : s.params.all()) {
        if (!p.frozen) continue;
        EXPECT_FALSE(p.grad.given()) << p.spec.name;
        const std::vector<float> whole = golden.parameter(p.spec, "");
        std::int64_t i = 0, differ = 0;
        Golden::for_each_index(p.shard, p.spec.shape, [&](std::int64_t at) {
          differ += p.value.as<float>()[i++] != whole[static_cast<std::size_t>(at)] ? 1 : 0;
        });
        EXPECT_EQ(differ, 0) << p.spec.name;
        seen[p.spec.name] += i;
      }
    });
  });
  EXPECT_EQ(seen.size(), frozen.size());
  Layout all = l;
  all.freeze = {};
  const Outcome trained = run_in_layout(all);
  EXPECT_EQ(outcome.losses[0], trained.losses[0]);
  EXPECT_EQ(outcome.gradients.size() + frozen.size(), trained.gradients.size());
  for (const auto& [name, gradient] : outcome.gradients)
    EXPECT_EQ(trained.gradients.at(name), gradient) << name;
  for (const std::string& name : frozen) EXPECT_FALSE(outcome.weights.contains(name)) << name;
}

TEST_P(Frozen, EqualsOneRank) {
  Layout l = GetParam();
  if (l.mesh.world() > 1) expect_equal(one_rank(l), run_in_layout(l));
}

INSTANTIATE_TEST_SUITE_P(Layouts, Frozen, testing::ValuesIn(frozen_layouts()), [](const auto& l) {
  std::string name =
      fmt::format("{}_{}_{}", fmt::join(l.param.freeze, "_"), l.param.str(), name_of(l.param.recompute));
  for (char& c : name)
    if (std::isalnum(static_cast<unsigned char>(c)) == 0) c = '_';
  return name;
});

struct Rehearsed {
  MemoryUse memory;
  std::map<std::string, Cost, std::less<>> entries;
  double model_flops = 0;
};

Rehearsed rehearsed(const std::vector<std::string>& freeze, int tp = 1) {
  Layout l{"moe_a27b", {1, 1, 1, tp, 1, 1}, 2};
  l.freeze = freeze;
  const Golden golden(l.model);
  Rehearsal rehearsal(run_of(l, golden, "unused"), golden.config(), 0, tp);
  rehearsal.step();
  const Ledger& ledger = rehearsal.step();
  return {rehearsal.memory_use(), ledger.entries(), ledger.total().model_flops};
}

std::int64_t values_of(const std::vector<std::string>& names, const ModelConfig& config) {
  std::int64_t sum = 0;
  for (const ParamSpec& p : make_param_table(config))
    if (std::find(names.begin(), names.end(), p.name) != names.end()) sum += p.shape.elements();
  return sum;
}

double flops_of(const Rehearsed& r, const std::string& op) {
  const auto found = r.entries.find(op);
  return found == r.entries.end() ? 0 : found->second.flops;
}

// In fp32: four bytes of gradient and eight of moments for every value; alignment may save some more or less.
TEST(FrozenCost, NoGradientAndNoMoments) {
  const ModelConfig config = Golden("moe_a27b").config();
  const Rehearsed all = rehearsed({});
  for (const std::string& preset : kPresets) {
    const Rehearsed frozen = rehearsed({preset});
    const auto values = static_cast<std::size_t>(values_of(frozen_names({preset}, config), config));
    const std::size_t tensors = frozen_names({preset}, config).size(), padding = 64 * sizeof(float) * tensors;
    EXPECT_NEAR(static_cast<double>(all.memory.gradients - frozen.memory.gradients),
                static_cast<double>(4 * values), static_cast<double>(padding))
        << preset;
    EXPECT_NEAR(static_cast<double>(all.memory.optimizer - frozen.memory.optimizer),
                static_cast<double>(8 * values), static_cast<double>(2 * padding))
        << preset;
    EXPECT_EQ(all.memory.parameters, frozen.memory.parameters) << preset;
  }
}

TEST(FrozenCost, NoProductOfAFrozenWeightsGradient) {
  const ModelConfig config = Golden("moe_a27b").config();
  const Rehearsed all = rehearsed({}), experts = rehearsed({"@experts"});
  EXPECT_GT(flops_of(all, "grouped_gemm_wgrad"), 0);
  EXPECT_EQ(flops_of(experts, "grouped_gemm_wgrad"), 0);
  EXPECT_EQ(flops_of(all, "grouped_gemm_dgrad"), flops_of(experts, "grouped_gemm_dgrad"));
  EXPECT_EQ(all.model_flops - experts.model_flops, flops_of(all, "grouped_gemm_wgrad"));
  EXPECT_EQ(flops_of(all, "gemm"), flops_of(experts, "gemm"));
  // Two FLOPs of the weight's gradient for each token and value.
  const Rehearsed router = rehearsed({"@router"});
  const double tokens = 4.0 * static_cast<double>(Golden("moe_a27b").seq_len());
  EXPECT_DOUBLE_EQ(flops_of(all, "gemm") - flops_of(router, "gemm"),
                   2 * tokens * static_cast<double>(values_of(frozen_names({"@router"}, config), config)));
  // All but the experts: their gradients alone are left, of all the model's.
  EXPECT_EQ(flops_of(rehearsed({"@non_experts"}), "grouped_gemm_wgrad"), flops_of(all, "grouped_gemm_wgrad"));
  EXPECT_LT(flops_of(rehearsed({"@non_experts"}), "gemm"), 0.75 * flops_of(all, "gemm"));
}

// The rows that experts are given and their hidden rows wait for the weights' gradients alone.
TEST(FrozenCost, RowsOfFrozenExpertsAreNotKept) {
  const Golden golden("moe_a27b");
  const ModelConfig& config = golden.config();
  const Rehearsed all = rehearsed({}), frozen = rehearsed({"@experts"});
  const std::int64_t rows = 2 * golden.seq_len() * config.num_experts_per_tok,  // of a micro-batch
      kept = rows * (config.hidden_size + config.moe_intermediate_size) * config.num_moe_layers();
  EXPECT_GE(all.memory.activations, frozen.memory.activations + static_cast<std::size_t>(4 * kept));
}

TEST(FrozenCost, BackwardEndsWhereNothingBelowTrains) {
  const Rehearsed all = rehearsed({}), half = rehearsed({"embed_VD", "layers.0.*"}),
                  head = rehearsed({"embed_VD", "layers.*"});
  ASSERT_EQ(Golden("moe_a27b").config().num_hidden_layers, 2);
  for (const char* op : {"attention_backward", "grouped_gemm_dgrad", "grouped_gemm_wgrad"}) {
    EXPECT_GT(flops_of(all, op), 0) << op;
    EXPECT_EQ(2 * flops_of(half, op), flops_of(all, op)) << op;
    EXPECT_EQ(flops_of(head, op), 0) << op;
  }
  EXPECT_EQ(flops_of(half, "attention_forward"), flops_of(all, "attention_forward"));
  // Where the embedding trains, everything is on its way.
  EXPECT_EQ(flops_of(rehearsed({"layers.0.*"}), "attention_backward"), flops_of(all, "attention_backward"));
}

TEST(FrozenCost, TokensOfAFrozenAttentionAreNotGathered) {
  const auto sent = [](const Rehearsed& r) { return r.entries.at("all_gather").bytes_sent; };
  EXPECT_LT(sent(rehearsed({"@attention"}, 2)), sent(rehearsed({}, 2)));
}

}  // namespace
}  // namespace upmoe::test
