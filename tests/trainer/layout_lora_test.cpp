// Low-rank adapters in whole models: every mesh computes what one rank does, nothing else changes, a run begins as the
// model that it starts from, and gradients and outputs are those of weights that the adapters are merged into.

#include <gtest/gtest.h>

#include "configs/adapter_params.h"
#include "data/merged_weights.h"
#include "tests/support/layout_outcomes.h"
#include "tests/support/temporary_directory.h"
#include "trainer/freeze.h"
#include "trainer/rehearsal.h"

namespace upmoe {
namespace {

using test::expect_equal;
using test::Golden;
using test::Layout;
using test::Limits;
using test::one_rank;
using test::Outcome;
using test::relative_distance;
using test::run_in_layout;
using test::Tensors;
using enum LoraTarget;

const std::vector<LoraTarget> kEverything = [] {
  std::vector<LoraTarget> all;
  for (const auto& target : kNames<LoraTarget>.built) all.push_back(target.value);
  return all;
}();

Layout adapted(const std::string& model, const MeshSpec& mesh,
               const std::vector<LoraTarget>& targets = kEverything) {
  Layout l{model, mesh, 1};
  l.lora = {3, 6, targets};
  l.steps = 3;
  l.eps = 1e-6;
  return l;
}

std::vector<Layout> lora_layouts() {
  std::vector<Layout> all;
  // pp, dp, cp, tp, ep, etp: each alone, then together.
  for (const MeshSpec& mesh :
       {MeshSpec{1, 2, 1, 1, 1, 1}, MeshSpec{1, 2, 1, 1, 2, 1}, MeshSpec{1, 1, 1, 2, 1, 1},
        MeshSpec{1, 2, 1, 1, 1, 2}, MeshSpec{1, 1, 2, 1, 1, 1}, MeshSpec{2, 1, 1, 1, 1, 1},
        MeshSpec{1, 4, 1, 1, 2, 2}, MeshSpec{2, 1, 2, 2, 2, 2}})
    all.push_back(adapted("moe_a27b", mesh));
  all.push_back(adapted("moe_mixed", {1, 1, 1, 2, 2, 1}));
  all.push_back(adapted("moe_odd", {1, 2, 1, 1, 2, 1}));
  all.push_back(adapted("dense_tied_gqa", {1, 1, 1, 6, 1, 1}));  // three ranks for each key/value head
  all.push_back(adapted("qwen3", {1, 1, 1, 2, 1, 1}));
  // Some of a joined product's modules.
  all.push_back(adapted("moe_a27b", {1, 2, 1, 2, 2, 2}, {kQuery, kValue}));
  all.push_back(adapted("moe_a27b", {1, 2, 1, 2, 2, 2}, {kKey, kUp}));
  all.push_back(adapted("moe_a27b", {1, 2, 1, 2, 2, 2}, {kGate, kDown}));
  // A rank without experts: its adapters are of none.
  for (const std::vector<LoraTarget>& targets : {kEverything, {kUp}}) {
    all.push_back(adapted("moe_mixed", {1, 4, 1, 1, 4, 1}, targets));
    all.back().num_experts = 3;
  }
  // Blocks that share their gradients' memory, and what backward makes again.
  all.push_back(adapted("moe_a27b", {1, 2, 1, 2, 2, 2}));
  all.back().zero = 2;
  for (const auto& policy : kNames<Recompute>.built) {
    if (policy.value == Recompute::kNone) continue;
    all.push_back(adapted("moe_a27b", {1, 2, 1, 2, 2, 1}));
    all.back().recompute = policy.value;
  }
  return all;
}

std::string name_of_case(const testing::TestParamInfo<Layout>& info) {
  std::string targets;
  for (const LoraTarget t : info.param.lora.targets) targets += fmt::format("_{}", name_of(t));
  return fmt::format("{}{}_{}_zero{}", info.param.str(), targets, name_of(info.param.recompute),
                     info.param.zero);
}

class Lora : public testing::TestWithParam<Layout> {};

TEST_P(Lora, EqualsOneRank) {
  expect_equal(one_rank(GetParam()), run_in_layout(GetParam()));
}

// Every bit of the model's own parameters stays, and they have neither gradients nor moments.
TEST_P(Lora, OnlyAdaptersTrain) {
  const Layout& l = GetParam();
  const Golden golden(l.model);
  const ModelConfig config = test::config_of(l, golden);
  std::size_t adapters = 0;
  for (const ParamSpec& p : make_param_table(config)) adapters += p.adapts ? 1 : 0;
  Outcome outcome;
  std::mutex mutex;
  run_in_threads(l.mesh.world(), [&](Communicator& world) {
    test::run_rank(world, golden, l, outcome, mutex, {}, [&](Session& s) {
      for (const StoredParam& p : s.params.all()) {
        EXPECT_EQ(p.frozen, !p.spec.adapts && p.spec.trained) << p.spec.name;
        if (p.spec.adapts || !p.spec.trained) continue;
        EXPECT_FALSE(p.grad.given()) << p.spec.name;
        std::vector<float> begun(static_cast<std::size_t>(p.spec.shape.elements()));
        test::weights_of(l, golden)(p.spec, whole(p.spec.shape), host_view(begun.data(), p.spec.shape));
        std::int64_t i = 0, differ = 0;
        Golden::for_each_index(p.shard, p.spec.shape, [&](std::int64_t at) {
          differ += p.value.as<float>()[i++] != begun[static_cast<std::size_t>(at)] ? 1 : 0;
        });
        EXPECT_EQ(differ, 0) << p.spec.name;
      }
    });
  });
  EXPECT_EQ(outcome.gradients.size(), adapters);
  EXPECT_EQ(outcome.weights.size(), adapters);
}

INSTANTIATE_TEST_SUITE_P(Layouts, Lora, testing::ValuesIn(lora_layouts()), name_of_case);

// One step on one rank: its loss, all gradients, and the values that it began with.
struct FirstStep {
  double loss = 0;
  Tensors gradients, values;
};

FirstStep first_step(const Layout& l, const Golden& golden, const ReadParam& read) {
  FirstStep step;
  run_in_threads(1, [&](Communicator& world) {
    const test::TemporaryDirectory folder;
    const std::filesystem::path tokens = folder.path() / "tokens.h5";
    golden.write_tokens(tokens);
    Session s(test::run_of(l, golden, tokens), test::config_of(l, golden), world);
    s.params.load(s.memory.exec, read);
    s.optimizer.reset(s.memory.exec);
    for (const StoredParam& p : s.params.all())
      step.values[p.spec.name].assign(p.value.as<float>(), p.value.as<float>() + p.value.elements());
    s.open_data(0);
    step.loss = Trainer(s).step(1).loss;
    for (const StoredParam& p : s.params.all())
      if (p.trains())
        step.gradients[p.spec.name].assign(p.grad.as<float>(), p.grad.as<float>() + p.grad.elements());
  });
  return step;
}

// Adapters as a run begins with them.
ReadParam as_begun(const Golden& golden) {
  return [&golden](const ParamSpec& spec, const Box& box, TensorView out) {
    spec.adapts ? initial_values(spec, 5, box, out) : test::golden_weights(golden)(spec, box, out);
  };
}

const std::vector<std::string> kModels{"moe_a27b", "moe_mixed", "dense_tied_gqa", "qwen3", "mixtral"};

TEST(LoraModel, BeginsWithTheModelsOwnLoss) {
  for (const std::string& model : kModels) {
    const Golden golden(model);
    const Layout l = adapted(model, {});
    Layout plain = l;
    plain.lora = {};
    const FirstStep with = first_step(l, golden, as_begun(golden)),
                    without = first_step(plain, golden, as_begun(golden));
    EXPECT_EQ(with.loss, without.loss) << model;
    for (const auto& [name, gradient] : with.gradients) {
      const bool is_a = name.find("lora_A") != std::string::npos;
      const bool zero = std::all_of(gradient.begin(), gradient.end(), [](float g) { return g == 0; });
      EXPECT_EQ(zero, is_a) << name;  // b is zero
    }
  }
}

// With y = (w + s b a) x, the gradients of a and b are s b^T dw and s dw a^T, dw being that of a model whose weight is
// w + s b a: computed without adapters, by another way through the program.
Tensors from_weight_gradients(const ModelConfig& config, const FirstStep& merged, const Tensors& values) {
  Tensors expected;
  const double s = config.lora.scale();
  const auto at = [](std::int64_t i) { return static_cast<std::size_t>(i); };
  for (const ParamSpec& p : make_param_table(config)) {
    if (!p.adapts || p.adapts->factor == AdapterFactor::kB) continue;
    const AdaptedPart& part = p.adapts->part;
    const ParamSpec weight = make_param(config, part.role, p.layer);
    const std::string a_name = adapter_name(part, AdapterFactor::kA, p.layer),
                      b_name = adapter_name(part, AdapterFactor::kB, p.layer);
    const std::vector<float>&a = values.at(a_name), &b = values.at(b_name),
          &dw = merged.gradients.at(weight.name);
    const std::int64_t E = weight.expert ? weight.shape[0] : 1, L = config.lora.rank,
                       H = part.half == Half::kWhole ? 1 : 2, h = part.half == Half::kUp ? 1 : 0,
                       K = static_cast<std::int64_t>(a.size()) / E / L,
                       N = static_cast<std::int64_t>(b.size()) / E / L;
    std::vector<double> da(a.size()), db(b.size());
    for (std::int64_t e = 0; e < E; ++e)
      for (std::int64_t n = 0; n < N; ++n)
        for (std::int64_t k = 0; k < K; ++k) {
          const double g = s * double(dw[at(((e * N + n) * H + h) * K + k)]);
          for (std::int64_t l = 0; l < L; ++l) {
            da[at((e * L + l) * K + k)] += g * double(b[at((e * N + n) * L + l)]);
            db[at((e * N + n) * L + l)] += g * double(a[at((e * L + l) * K + k)]);
          }
        }
    expected[a_name].assign(da.begin(), da.end());
    expected[b_name].assign(db.begin(), db.end());
  }
  return expected;
}

// Two ways to one sum, as two layouts are, and merged weights, of which each is rounded once more: together twice
// what layouts may differ by.
TEST(LoraModel, ComputesAndLearnsAsTheMergedModelDoes) {
  for (const std::string& model : kModels) {
    const Golden golden(model);
    const Layout l = adapted(model, {});
    const ModelConfig config = test::config_of(l, golden);
    // Neither is zero.
    const ReadParam read = [&](const ParamSpec& spec, const Box& box, TensorView out) {
      ParamSpec drawn = spec;
      if (spec.adapts) drawn.init = {Init::Kind::kUniform, 0.2f};
      spec.adapts ? initial_values(drawn, 6, box, out) : test::golden_weights(golden)(spec, box, out);
    };
    Layout plain = l;
    plain.lora = {};
    const FirstStep with = first_step(l, golden, read),
                    merged = first_step(plain, golden, with_adapters_merged(config, read)),
                    without = first_step(plain, golden, read);
    EXPECT_NEAR(with.loss, merged.loss, 2 * Limits{}.loss * merged.loss) << model;
    EXPECT_GT(std::abs(with.loss - without.loss), 1e-4 * without.loss) << model;
    double squares = 0;
    for (const auto& [name, gradient] : with.gradients)
      for (const float g : gradient) squares += double(g) * double(g);
    for (const auto& [name, gradient] : from_weight_gradients(config, merged, with.values))
      EXPECT_LT(relative_distance(gradient, with.gradients.at(name), 1e-3 * std::sqrt(squares)),
                2 * Limits{}.gradient)
          << name;
  }
}

struct Rehearsed {
  MemoryUse memory;
  double model_flops = 0;
};

Rehearsed rehearsed(const Golden& golden, int rank, const std::vector<LoraTarget>& targets) {
  Layout l = adapted("moe_a27b", {}, targets);
  l.lora.rank = rank;
  Rehearsal rehearsal(test::run_of(l, golden, "unused"), test::config_of(l, golden), 0, 1);
  rehearsal.step();
  const double flops = rehearsal.step().total().model_flops;
  return {rehearsal.memory_use(), flops};
}

// Two FLOPs for each token and value of a and b, three times: forward, gradients of the input, of the matrices.
TEST(LoraCost, LowRankProductsAreBooked) {
  const Golden golden("moe_a27b");
  const ModelConfig& c = golden.config();
  const double tokens = 4.0 * static_cast<double>(golden.seq_len()), layers = c.num_moe_layers();
  const auto more = [&](LoraTarget target) {
    return rehearsed(golden, 6, {target}).model_flops - rehearsed(golden, 2, {target}).model_flops;
  };
  const auto D = static_cast<double>(c.hidden_size), F = static_cast<double>(c.moe_intermediate_size),
             shared = static_cast<double>(c.shared_expert_intermediate_size),
             heads = static_cast<double>(c.num_attention_heads * c.head_dim);
  EXPECT_DOUBLE_EQ(more(kOutput), 3 * 2 * tokens * layers * 4 * (heads + D));
  EXPECT_DOUBLE_EQ(more(kDown), 3 * 2 * tokens * layers * 4 * (shared + D + c.num_experts_per_tok * (F + D)));
}

TEST(LoraCost, GradientsAndMomentsAreOfAdaptersAlone) {
  const Golden golden("moe_a27b");
  const Rehearsed r = rehearsed(golden, 4, kEverything);
  Layout l = adapted("moe_a27b", {});
  l.lora.rank = 4;
  std::size_t values = 0, tensors = 0;
  for (const ParamSpec& p : make_param_table(test::config_of(l, golden))) {
    values += p.adapts ? static_cast<std::size_t>(p.shape.elements()) : 0;
    tensors += p.adapts ? 1 : 0;
  }
  const auto padding = static_cast<double>(64 * sizeof(float) * tensors);
  EXPECT_NEAR(static_cast<double>(r.memory.gradients), static_cast<double>(4 * values), padding);
  EXPECT_NEAR(static_cast<double>(r.memory.optimizer), static_cast<double>(8 * values), 2 * padding);
}

TEST(LoraModel, LeavesNoRoomForOtherFreezing) {
  const Golden golden("moe_a27b");
  const ModelConfig config = test::config_of(adapted("moe_a27b", {}), golden);
  EXPECT_THROW(frozen_names({"@router"}, config), Error);
  std::size_t trained = 0;
  for (const ParamSpec& p : make_param_table(golden.config())) trained += p.trained ? 1 : 0;
  EXPECT_EQ(frozen_names({}, config).size(), trained);
}

}  // namespace
}  // namespace upmoe
