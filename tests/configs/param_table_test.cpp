// The list of parameters: order, shapes and meaning; and the counts that the literature gives for known models.

#include "configs/param_table.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>

namespace upmoe {
namespace {

using ::testing::AllOf;
using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::Not;

struct Dense {
  int layers;
  std::int64_t hidden;
  int heads, kv_heads;
  std::int64_t width, vocab;
  bool bias = false;
  std::int64_t head_dim = 0;
  bool tied = false;
};
ModelConfig dense(const Dense& d) {
  ModelConfig c;
  c.num_hidden_layers = d.layers;
  c.hidden_size = d.hidden;
  c.num_attention_heads = d.heads;
  c.num_key_value_heads = d.kv_heads;
  c.head_dim = d.head_dim > 0 ? d.head_dim : d.hidden / d.heads;
  c.intermediate_size = d.width;
  c.vocab_size = d.vocab;
  c.qkv_bias = d.bias;
  c.tie_word_embeddings = d.tied;
  return c;
}
ModelConfig mixture(const Dense& d, int experts, int top_k, std::int64_t width, std::int64_t shared) {
  ModelConfig c = dense(d);
  c.model_type = "qwen2_moe";
  c.num_experts = experts;
  c.num_experts_per_tok = top_k;
  c.moe_intermediate_size = width;
  c.shared_expert_intermediate_size = shared;
  return c;
}
ModelConfig a27b() {
  return mixture({24, 2048, 16, 16, 5632, 151936, true}, 60, 4, 1408, 5632);
}

std::string billions(const ModelConfig& c) {
  const ParamCounts n = count_params(c);
  const auto b = [](std::int64_t x) { return static_cast<double>(x) * 1e-9; };
  return fmt::format("{:.4f} {:.4f} {:.4f}", b(n.total), b(n.activated), b(n.activated_non_embedding));
}

// Total, activated, activated without embeddings. Not expressible: Qwen3-30B-A3B (norms of queries and keys).
TEST(ParamCounts, OfKnownModels) {
  EXPECT_EQ(billions(dense({32, 4096, 32, 8, 14336, 32000})), "7.2417 7.2417 6.9796");          // Mistral-7B
  EXPECT_EQ(billions(dense({32, 4096, 32, 32, 11008, 151936, true})), "7.7213 7.7213 6.4767");  // Qwen1.5-7B
  EXPECT_EQ(billions(dense({28, 3072, 16, 16, 24576, 256000, false, 256, true})),
            "8.5377 8.5377 7.7512");                                                           // Gemma-7B
  EXPECT_EQ(billions(dense({24, 2048, 16, 16, 5504, 151936, true})), "1.8368 1.8368 1.2145");  // Qwen1.5-1.8B
  EXPECT_EQ(billions(a27b()), "14.3158 2.6892 2.0668");
  EXPECT_EQ(billions(mixture({32, 4096, 32, 8, 14336, 32000}, 8, 2, 14336, 0)),
            "46.7028 12.8799 12.6178");  // Mixtral
  EXPECT_EQ(billions(mixture({28, 3584, 28, 4, 18944, 151936, true}, 64, 8, 2560, 20480)),
            "57.4087 14.2493 13.1602");  // Qwen2-57B-A14B
  EXPECT_EQ(billions(mixture({40, 6144, 48, 8, 10752, 100352}, 16, 4, 10752, 0)),
            "131.5965 36.4697 35.2366");  // DBRX
}

// DeepSeekMoE-16B has no gate at its shared experts, and a dense first layer.
TEST(ParamCounts, OfDeepSeekMoe) {
  ModelConfig c = mixture({28, 2048, 16, 16, 10944, 102400}, 64, 6, 1408, 2816);
  c.mlp_only_layers = {0};
  c.shared_expert_gate = false;
  EXPECT_EQ(billions(c), "16.3757 2.8287 2.4092");
}

TEST(ParamCounts, Exact) {
  EXPECT_EQ(count_params(a27b()).total, 14'315'784'192);
  EXPECT_EQ(count_params(dense({24, 2048, 16, 16, 5504, 151936, true})).total, 1'836'828'672);
}

std::vector<std::string> names(const ModelConfig& c) {
  std::vector<std::string> all;
  for (const ParamSpec& p : make_param_table(c)) all.push_back(p.name);
  return all;
}

// One weight for all heads of queries, one for those of keys, before what the heads give; nothing of them decays.
TEST(ParamTable, NormsOfHeads) {
  ModelConfig c = dense({2, 8, 2, 1, 12, 32, true});
  c.qkv_bias = false;
  c.qk_norm = QkNorm::kPerHead;
  const std::vector<ParamSpec> table = make_param_table(c);
  const auto q = std::find_if(table.begin(), table.end(),
                              [](const ParamSpec& p) { return p.layer == 1 && p.role == Role::kQueryNorm; });
  ASSERT_NE(q, table.end());
  EXPECT_EQ(q->name, "layers.1.attn.q_norm_H");
  EXPECT_EQ((q + 1)->name, "layers.1.attn.k_norm_H");
  EXPECT_EQ((q + 2)->name, "layers.1.attn.o_DNH");
  for (const ParamSpec& p : {q[0], q[1]}) {
    EXPECT_EQ(p.shape, Shape({c.head_dim}));
    EXPECT_EQ(p.init.kind, Init::Kind::kOnes);
    EXPECT_FALSE(p.decay);
    EXPECT_FALSE(p.joins_previous);
  }
}

// A weight that is added to one begins at zero.
TEST(ParamTable, NormsAreOneAtFirst) {
  ModelConfig c = dense({2, 8, 2, 1, 12, 32, true});
  for (const auto& [norm, init] :
       {std::pair{NormKind::kRms, Init::Kind::kOnes}, {NormKind::kRmsPlusOne, Init::Kind::kZeros}}) {
    c.norm = norm;
    for (const Role role : {Role::kNorm1, Role::kNorm2, Role::kFinalNorm}) {
      EXPECT_EQ(make_param(c, role).init.kind, init);
      EXPECT_FALSE(make_param(c, role).decay);
    }
  }
}

TEST(ParamTable, DenseLayersInFront) {
  ModelConfig c = mixture({4, 8, 2, 1, 12, 32, true}, 3, 2, 6, 10);
  EXPECT_TRUE(c.is_moe_layer(0));
  c.first_k_dense_replace = 2;
  EXPECT_FALSE(c.is_moe_layer(0) || c.is_moe_layer(1));
  EXPECT_EQ(c.num_moe_layers(), 2);
}

TEST(ParamTable, OrderOfNames) {
  ModelConfig c = mixture({2, 8, 2, 1, 12, 32, true}, 3, 2, 6, 10);
  c.mlp_only_layers = {0};
  EXPECT_THAT(
      names(c),
      ElementsAre("embed_VD", "layers.0.norm1_D", "layers.0.attn.q_NHD", "layers.0.attn.k_NHD",
                  "layers.0.attn.v_NHD", "layers.0.attn.q_NH", "layers.0.attn.k_NH", "layers.0.attn.v_NH",
                  "layers.0.attn.o_DNH", "layers.0.norm2_D", "layers.0.ffn.gate_up_F2D",
                  "layers.0.ffn.down_DF", "layers.1.norm1_D", "layers.1.attn.q_NHD", "layers.1.attn.k_NHD",
                  "layers.1.attn.v_NHD", "layers.1.attn.q_NH", "layers.1.attn.k_NH", "layers.1.attn.v_NH",
                  "layers.1.attn.o_DNH", "layers.1.norm2_D", "layers.1.moe.router_ED",
                  "layers.1.moe.gate_up_EF2D", "layers.1.moe.down_EDF", "layers.1.shared.gate_1D",
                  "layers.1.shared.gate_up_F2D", "layers.1.shared.down_DF", "norm_D", "head_VD"));
  c.tie_word_embeddings = true;
  EXPECT_EQ(names(c).back(), "norm_D");
  c.shared_expert_intermediate_size = 0;
  c.qkv_bias = false;
  for (const std::string& name : names(c)) {
    EXPECT_TRUE(name.find("shared") == std::string::npos && !name.ends_with("_NH")) << name;
  }
  c.shared_expert_intermediate_size = 10;
  c.shared_expert_gate = false;
  EXPECT_THAT(names(c), AllOf(Contains("layers.1.shared.down_DF"), Not(Contains("layers.1.shared.gate_1D"))));
}

TEST(ParamTable, ABufferIsCountedApart) {
  ModelConfig c = mixture({2, 8, 2, 1, 12, 32, true}, 3, 2, 6, 10);
  c.mlp_only_layers = {0};
  const ParamCounts without = count_params(c);
  EXPECT_EQ(without.buffers, 0);
  for (const ParamSpec& p : make_param_table(c)) EXPECT_TRUE(p.trained && !p.fp32) << p.name;
  c.router_bias = true;
  const ParamCounts with = count_params(c);
  EXPECT_EQ(with.buffers, 3);
  EXPECT_EQ(with.total, without.total);
  EXPECT_EQ(with.activated, without.activated);
  const ParamSpec bias = make_param(c, Role::kRouterBias, 1);
  EXPECT_THAT(names(c), Contains(bias.name));
  EXPECT_EQ(bias.shape, Shape({3}));
  EXPECT_TRUE(bias.fp32 && !bias.trained && !bias.decay);
  EXPECT_EQ(bias.init.kind, Init::Kind::kZeros);
}

// A matrix like the router's, that begins at zero and trains.
TEST(ParamTable, NoiseIsAddedByTraining) {
  ModelConfig c = mixture({2, 8, 2, 1, 12, 32, true}, 3, 2, 6, 10);
  c.mlp_only_layers = {0};
  const ParamCounts without = count_params(c);
  for (const ParamSpec& p : make_param_table(c)) EXPECT_FALSE(p.added) << p.name;
  c.router.kind = RouterKind::kNoisy;
  const ParamSpec noise = make_param(c, Role::kRouterNoise, 1), router = make_param(c, Role::kRouter, 1);
  EXPECT_THAT(names(c), Contains(noise.name));
  EXPECT_EQ(noise.shape, router.shape);
  EXPECT_EQ(noise.dims, router.dims);
  EXPECT_TRUE(noise.added && noise.trained && noise.decay && !noise.fp32 && !noise.expert);
  EXPECT_EQ(noise.init.kind, Init::Kind::kZeros);
  EXPECT_EQ(count_params(c).total, without.total + router.shape.elements());
  EXPECT_EQ(count_params(c).buffers, 0);
}

TEST(ParamTable, ShapesDimsAndKinds) {
  ModelConfig c = mixture({1, 8, 4, 2, 12, 32, true, 6}, 3, 2, 5, 10);
  c.initializer_range = 0.25;
  std::set<std::string> seen;
  for (const ParamSpec& p : make_param_table(c)) {
    EXPECT_TRUE(seen.insert(p.name).second) << p.name;
    const bool vector = p.shape.rank == 1, bias = p.name.ends_with("_NH");
    EXPECT_EQ(p.decay, !vector && !bias) << p.name;
    EXPECT_EQ(p.init.kind, vector ? Init::Kind::kOnes
                           : bias ? Init::Kind::kZeros
                                  : Init::Kind::kNormal)
        << p.name;
    EXPECT_EQ(p.init.size, 0.25f);
    EXPECT_EQ(p.expert, p.name == "layers.0.moe.gate_up_EF2D" || p.name == "layers.0.moe.down_EDF") << p.name;
    EXPECT_EQ(p.layer, p.name.starts_with("layers.") ? 0 : kOutsideBlocks) << p.name;
    EXPECT_EQ(p.name, param_name(p.role, p.layer));
    EXPECT_EQ(p.joins_previous,
              p.name.find(".k_N") != std::string::npos || p.name.find(".v_N") != std::string::npos)
        << p.name;
    const auto is = [&](const Shape& shape, std::vector<Dim> dims) {
      EXPECT_EQ(p.shape, shape) << p.name << " " << p.shape.str();
      EXPECT_TRUE(std::equal(dims.begin(), dims.end(), p.dims.begin())) << p.name;
    };
    if (p.name.ends_with("q_NHD")) is({4, 6, 8}, {Dim::kHeads, Dim::kHeadSize, Dim::kEmbed});
    if (p.name.ends_with("k_NHD")) is({2, 6, 8}, {Dim::kKvHeads, Dim::kHeadSize, Dim::kEmbed});
    if (p.name.ends_with("v_NH")) is({2, 6}, {Dim::kKvHeads, Dim::kHeadSize});
    if (p.name.ends_with("o_DNH")) is({8, 4, 6}, {Dim::kEmbed, Dim::kHeads, Dim::kHeadSize});
    if (p.name.ends_with("router_ED")) is({3, 8}, {Dim::kOne, Dim::kEmbed});
    if (p.name.ends_with("gate_up_EF2D"))
      is({3, 5, 2, 8}, {Dim::kExpert, Dim::kFfn, Dim::kPair, Dim::kEmbed});
    if (p.name.ends_with("down_EDF")) is({3, 8, 5}, {Dim::kExpert, Dim::kEmbed, Dim::kFfn});
    if (p.name.ends_with("gate_1D")) is({1, 8}, {Dim::kOne, Dim::kEmbed});
    if (p.name.ends_with("shared.gate_up_F2D")) is({10, 2, 8}, {Dim::kFfn, Dim::kPair, Dim::kEmbed});
    if (p.name.ends_with("shared.down_DF")) is({8, 10}, {Dim::kEmbed, Dim::kFfn});
    if (p.name == "embed_VD" || p.name == "head_VD") is({32, 8}, {Dim::kVocab, Dim::kEmbed});
  }
  EXPECT_EQ(seen.size(), 18u);
}

}  // namespace
}  // namespace upmoe
