// Mixtures that become larger ones: copies in their places, the same function where it must stay, and bad input.

#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "parallel/thread_comm.h"
#include "tests/support/read_file.h"
#include "tests/support/tiny_dense.h"
#include "upcycle/upcycler.h"

namespace upmoe {
namespace {

using namespace test;
namespace fs = std::filesystem;

// A model directory in memory.
struct Made {
  explicit Made(const fs::path& dir) : model(dir) {
    const DType dtype = dtype_of(model.config().dtype).value();
    for (const SafetensorsEntry* entry : model.tensors()) {
      if (!model.uses(entry->name)) continue;  // of a shared expert of width 0
      const auto [file, found] = model.locate(entry->name);
      std::vector<std::byte> bytes(found->end - found->begin);
      file->read(*found, 0, bytes);
      tensors[entry->name] = to_doubles(bytes, dtype);
    }
  }
  HfModel model;
  NaiveTensors tensors;
};

class Growth : public ::testing::Test {
 protected:
  UpcycleOptions options(const std::string& from, const std::string& to) const {
    UpcycleOptions o;
    o.from = dir_.path() / from;
    o.to = dir_.path() / to;
    o.threads = 2;
    o.piece_bytes = 4096;
    o.progress = false;
    return o;
  }
  void run(const UpcycleConfig& config, const std::string& from, const std::string& to, int ranks = 1) const {
    run_in_threads(ranks, [&](Communicator& comm) { upcycle(config, options(from, to), comm); });
  }
  double error_of(const std::string& dir) const {
    const auto report = nlohmann::json::parse(read_file(dir_.path() / dir / "upcycle_report.json"));
    double worst = 0;
    for (const auto& layer : report.at("layers"))
      worst = std::max(worst, layer.at("relative_error").get<double>());
    return worst;
  }
  // A mixture of a dense model of this family: experts that differ, and routers that tell them apart.
  UpcycleConfig mixture(const TinyShape& shape, bool renormalised, std::int64_t shared) const {
    write_tiny_dense(dir_.path() / "dense", shape);
    UpcycleConfig c = tiny_recipe();
    c.target = {.num_experts = 6,
                .num_experts_per_tok = 2,
                .moe_intermediate_size = 22,
                .shared_expert_intermediate_size = shared,
                .norm_topk_prob = renormalised};
    c.experts.scale = 3;
    c.shared.method = shared > 0 ? SharedMethod::kDense : SharedMethod::kNone;
    c.router.std = 0.5;
    if (shape.family == std::string("qwen2") && shape.layers > 2)
      c.target.layers = {LayerChoice::Kind::kFirstDense, 1, {}};
    run(c, "dense", "moe");
    return c;
  }
  static UpcycleConfig grown(const UpcycleConfig& mixture, int copies) {
    UpcycleConfig c;
    c.origin = "growth";
    c.target = mixture.target;
    c.target.num_experts *= copies;
    c.target.num_experts_per_tok *= copies;
    c.target.layers = {};
    c.grow.copies = copies;
    return c;
  }
  static double distance(const Made& found, const Made& expected) {
    double difference = 0, norm = 0;
    const ModelConfig& config = expected.model.config();
    for (int layer = 0; layer < config.num_hidden_layers; ++layer) {
      if (!config.is_moe_layer(layer)) continue;
      for (int t = 0; t < 16; ++t) {
        std::vector<float> z(static_cast<std::size_t>(config.hidden_size));
        normal_batch(5, static_cast<std::uint64_t>(layer * 16 + t) * z.size(), config.hidden_size, z.data());
        const NaiveVector x(z.begin(), z.end());
        const NaiveVector e = naive_moe(expected.tensors, config, layer, x),
                          f = naive_moe(found.tensors, found.model.config(), layer, x);
        for (std::size_t d = 0; d < x.size(); ++d) {
          difference += (f[d] - e[d]) * (f[d] - e[d]);
          norm += e[d] * e[d];
        }
      }
    }
    return std::sqrt(difference / norm);
  }

  TemporaryDirectory dir_;
};

TEST_F(Growth, EveryExpertIsThereSeveralTimesAndTheFunctionStays) {
  struct Case {
    const char* family;
    bool renormalised;
    std::int64_t shared;
    DType dtype;
  };
  for (const Case& c : {Case{"qwen2", false, 88, DType::kF32}, Case{"qwen2", true, 0, DType::kBF16},
                        Case{"llama", true, 0, DType::kF32}, Case{"qwen3", true, 0, DType::kF32}}) {
    SCOPED_TRACE(c.family);
    for (const char* name : {"dense", "moe", "larger"}) fs::remove_all(dir_.path() / name);
    const UpcycleConfig from =
        mixture({.layers = 3, .dtype = c.dtype, .family = c.family}, c.renormalised, c.shared);
    run(grown(from, 3), "moe", "larger", 2);
    const Made moe(dir_.path() / "moe"), larger(dir_.path() / "larger");
    EXPECT_EQ(larger.model.config().num_experts, 18);
    EXPECT_EQ(larger.model.config().num_experts_per_tok, 6);
    EXPECT_EQ(larger.model.config().mlp_only_layers, moe.model.config().mlp_only_layers);
    const ModelConfig &a = moe.model.config(), &b = larger.model.config();
    for (int layer = 0; layer < a.num_hidden_layers; ++layer) {
      if (!a.is_moe_layer(layer)) continue;
      const NaiveVector& router = tensor(moe.tensors, name_on_disk(a, Role::kRouter, layer));
      NaiveVector repeated;
      for (int i = 0; i < 3; ++i) repeated.insert(repeated.end(), router.begin(), router.end());
      EXPECT_EQ(tensor(larger.tensors, name_on_disk(b, Role::kRouter, layer)), repeated);
      for (std::size_t e = 0; e < 18; ++e)
        for (const Half half : {Half::kGate, Half::kUp})
          EXPECT_EQ(tensor(larger.tensors, name_on_disk(b, Role::kExpertGateUp, layer, e, half)),
                    tensor(moe.tensors, name_on_disk(a, Role::kExpertGateUp, layer, e % 6, half)));
    }
    // The first ones are the source's, and so is all the rest.
    for (const auto& [name, values] : moe.tensors) {
      const bool router = name.ends_with("mlp.gate.weight") || name.ends_with("block_sparse_moe.gate.weight");
      if (router) continue;
      EXPECT_EQ(tensor(larger.tensors, name), values) << name;
    }
    // A softmax over three times as many experts and a sum over as many more, in double.
    EXPECT_LT(distance(larger, moe), 2 * (18 + 6) * kDoubleUnit);
    EXPECT_LT(error_of("larger"), rounding_of_layer(b));
  }
}

// Noise parts the copies and as many chosen experts as before change the function: both say so in the report.
TEST_F(Growth, WhatIsNotExactSaysSo) {
  const UpcycleConfig from = mixture({}, false, 88);
  UpcycleConfig c = grown(from, 2);
  c.grow.noise = 0.05;
  run(c, "moe", "noisy");
  const Made moe(dir_.path() / "moe"), noisy(dir_.path() / "noisy");
  const char* router = "model.layers.1.mlp.gate.weight";
  const NaiveVector &a = tensor(moe.tensors, router), &b = tensor(noisy.tensors, router);
  double square = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    ASSERT_EQ(b[i], a[i]);
    const double noise = b[a.size() + i] - a[i];
    ASSERT_NE(noise, 0);
    square += noise * noise;
  }
  const auto n = static_cast<double>(a.size());
  EXPECT_NEAR(std::sqrt(square / n), 0.05, 4 * 0.05 / std::sqrt(2 * n));
  EXPECT_GT(error_of("noisy"), 1e-4);
  c = grown(from, 2);
  c.target.num_experts_per_tok = 2;
  run(c, "moe", "as_many");
  EXPECT_GT(error_of("as_many"), 1e-2);
}

TEST_F(Growth, TheSameBytesForAnyNumberOfRanks) {
  UpcycleConfig c = grown(mixture({}, true, 88), 2);
  c.grow.noise = 0.01;
  run(c, "moe", "one");
  for (const int ranks : {2, 3, 4}) {
    const std::string to = fmt::format("ranks{}", ranks);
    run(c, "moe", to, ranks);
    for (const char* file : {"model.safetensors", "upcycle_report.json", "config.json"})
      EXPECT_EQ(read_file(dir_.path() / to / file), read_file(dir_.path() / "one" / file)) << file << ranks;
  }
}

TEST_F(Growth, TheShippedRecipeFollowsTheDefaultOne) {
  const fs::path recipes = fs::path(UPMOE_SOURCE_DIR) / "configs/upcycle";
  write_tiny_dense(dir_.path() / "dense", {.hidden = 64, .ffn = 688});
  run(read_upcycle_config(recipes / "qwen1.5-moe-a2.7b-tiny.yaml", {}), "dense", "moe");
  const UpcycleConfig recipe = read_upcycle_config(recipes / "grow-2x-tiny.yaml", {});
  EXPECT_TRUE(recipe.notes.empty());
  run(recipe, "moe", "larger");
  EXPECT_LT(error_of("larger"), rounding_of_layer(HfModel(dir_.path() / "larger").config()));
}

TEST_F(Growth, WhatDoesNotFitIsTold) {
  const UpcycleConfig from = mixture({}, false, 88);
  const auto refusal = [&](const UpcycleConfig& config, const std::string& source) -> std::string {
    try {
      run(config, source, "larger", 2);
      ADD_FAILURE() << "was not refused";
    } catch (const Error& e) {
      return e.what();
    }
    return "";
  };
  std::string words = refusal(grown(from, 2), "dense");
  EXPECT_NE(words.find("starts from a mixture"), std::string::npos) << words;
  UpcycleConfig c = grown(from, 2);
  c.target.num_experts = 13;
  c.target.moe_intermediate_size = 21;
  c.target.norm_topk_prob = true;
  words = refusal(c, "moe");
  for (const char* part : {"num_experts: 13, expected 12", "moe_intermediate_size: 21, expected 22",
                           "norm_topk_prob: true, expected false"})
    EXPECT_NE(words.find(part), std::string::npos) << words;
  words = refusal(tiny_recipe(), "moe");
  EXPECT_NE(words.find("grow.copies"), std::string::npos) << words;
  EXPECT_FALSE(fs::exists(dir_.path() / "larger"));
}

}  // namespace
}  // namespace upmoe
