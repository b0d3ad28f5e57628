// What holds for every family: its tensors hold every parameter once, and its config.json says again what was read.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <set>
#include <span>

#include "configs/families/family.h"
#include "configs/router_record.h"
#include "data/hf_model.h"
#include "data/hf_writer.h"
#include "tests/data/models.h"
#include "tests/support/config_json.h"

namespace upmoe {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

// A small model of a family, with what sets it apart from others as far as it carries that.
ModelConfig model_of(const Family& family) {
  const auto carries = [&](Trait t) { return family.carries.has(t); };
  ModelConfig c;
  c.model_type = family.model_type;
  c.vocab_size = 11;
  c.hidden_size = 8;
  c.intermediate_size = 12;
  c.num_hidden_layers = 3;
  c.num_attention_heads = 4;
  c.num_key_value_heads = 2;
  c.head_dim = carries(Trait::kOwnHeadDim) ? 4 : 2;
  c.max_position_embeddings = 64;
  c.qkv_bias = carries(Trait::kBiases);
  if (!carries(Trait::kNoQkNorm)) c.qk_norm = QkNorm::kPerHead;
  if (!carries(Trait::kRmsNorm))
    c.norm = carries(Trait::kLayerNorm) ? NormKind::kLayerNorm : NormKind::kRmsPlusOne;
  if (!carries(Trait::kSilu)) c.activation = Activation::kGeluTanh;
  if (carries(Trait::kLayerNorm)) c.rms_norm_eps = 1e-5;
  if (carries(Trait::kClippedQkv)) c.clip_qkv = 8;
  c.scaled_embedding = !carries(Trait::kPlainEmbedding);
  if (carries(Trait::kWindow)) c.sliding_window = 16;
  if (!is_mixture(family)) return c;
  c.num_experts = 3;
  c.num_experts_per_tok = 2;
  c.moe_intermediate_size = 6;
  if (carries(Trait::kGatedShared) || carries(Trait::kUngatedShared))
    c.shared_expert_intermediate_size = carries(Trait::kSharedBetween) ? 10 : 12;
  c.shared_expert_gate = carries(Trait::kGatedShared);
  c.norm_topk_prob = carries(Trait::kRenormalised);
  if (carries(Trait::kExpertGroups)) {
    c.num_experts = 4;
    c.router.groups = 2;
  }
  if (carries(Trait::kScaledWeights)) c.router.scale = 2.5;
  if (carries(Trait::kDenseFirst)) c.mlp_only_layers = {0};
  if (carries(Trait::kDenseBetween)) c.mlp_only_layers = {1};
  if (family.from_dense != nullptr) family.from_dense(c);
  return c;
}

TEST(FamilyTensors, HoldEveryElementOnce) {
  for (const Family* family : families()) {
    const ModelConfig config = model_of(*family);
    std::set<std::pair<std::string, std::int64_t>> places;
    std::map<std::string, std::int64_t> held_by, elements_of;  // of the tensors on disk
    for (const ParamSpec& p : make_param_table(config)) {
      std::vector<int> held(static_cast<std::size_t>(p.shape.elements()), 0);
      for (const HfTensor& t : hf_tensors_of(config, p)) {
        EXPECT_TRUE(places.insert({t.name, t.begin}).second) << t.name;
        held_by[t.name] += t.part.elements();
        elements_of[t.name] = t.elements();
        EXPECT_EQ(t.expert, p.expert ? t.part.offset[0] : -1) << t.name;
        for (std::int64_t i = 0; i < p.shape.elements(); ++i) {
          Shape at = p.shape;
          std::int64_t rest = i;
          for (int d = p.shape.rank - 1; d >= 0; --d) {
            at.dim[static_cast<std::size_t>(d)] = rest % p.shape[d];
            rest /= p.shape[d];
          }
          Box element = whole(p.shape);
          element.offset = at;
          for (int d = 0; d < p.shape.rank; ++d) element.extent.dim[static_cast<std::size_t>(d)] = 1;
          held[static_cast<std::size_t>(i)] += contains(t.part, element) ? 1 : 0;
        }
      }
      EXPECT_EQ(held, std::vector<int>(held.size(), 1)) << p.name;
    }
    EXPECT_EQ(held_by, elements_of) << family->model_type;
    std::set<std::pair<std::string, std::int64_t>> all;
    for (const HfTensor& t : hf_tensors_of(config)) all.insert({t.name, t.begin});
    EXPECT_EQ(all, places) << family->model_type;
  }
}

// A value for each element of a parameter.
void fill_with_own(const ParamSpec& p, const Box& part, TensorView out) {
  for (std::int64_t i = 0; i < part.elements(); ++i) {
    std::int64_t rest = i, at = 0, stride = 1;
    for (int d = p.shape.rank - 1; d >= 0; --d) {
      at += (part.offset[d] + rest % part.extent[d]) * stride;
      rest /= part.extent[d];
      stride *= p.shape[d];
    }
    out.as<float>()[i] = test::pseudo_random(p.name, at);
  }
}

void expect_own(const HfModel& model, const ParamSpec& p, const Box& box) {
  std::vector<float> expected(static_cast<std::size_t>(box.elements())), read(expected.size());
  fill_with_own(p, box, host_view(expected.data(), box.extent));
  model.read(p, box, host_view(read.data(), box.extent));
  EXPECT_EQ(read, expected) << model.config().model_type << ' ' << p.name;
}

TEST(FamilyTensors, FilesAreReadAsTheyAreWritten) {
  const test::TemporaryDirectory folder;
  for (const Family* family : families()) {
    const ModelConfig config = model_of(*family);
    const std::filesystem::path dir = folder.path() / family->model_type;
    HfOutput output{dir, {}, {}, DType::kF32};
    output.max_shard_bytes = 3000;
    write_hf_model(output, config, fill_with_own);
    const HfModel model(dir);
    for (const ParamSpec& p : make_param_table(model.config())) {
      expect_own(model, p, whole(p.shape));
      for (std::uint64_t seed = 0; seed < 5; ++seed) expect_own(model, p, test::random_box(p.shape, seed, 1));
    }
  }
}

// Of DBRX: queries, keys and values one behind the other; the experts' rows likewise, w2 [E F, D].
TEST(FamilyTensors, OneTensorHoldsSeveralParts) {
  const test::TemporaryDirectory folder;
  const ModelConfig c = model_of(*find_family("dbrx"));
  write_hf_model(HfOutput{folder.path() / "m", {}, {}, DType::kF32}, c, fill_with_own);
  const HfModel model(folder.path() / "m");
  const auto values = [&](const std::string& name, std::vector<std::int64_t> shape) {
    const auto [file, entry] = model.locate("transformer.blocks.1." + name);
    EXPECT_EQ(entry->shape, shape) << name;
    std::vector<float> read((entry->end - entry->begin) / sizeof(float));
    file->read(*entry, 0, std::as_writable_bytes(std::span(read)));
    return read;
  };
  const std::int64_t D = c.hidden_size, E = c.num_experts, F = c.moe_intermediate_size,
                     q = c.num_attention_heads * c.head_dim, kv = c.num_key_value_heads * c.head_dim;
  const std::vector<float> qkv = values("norm_attn_norm.attn.Wqkv.weight", {q + 2 * kv, D}),
                           up = values("ffn.experts.mlp.v1", {E * F, D}),
                           down = values("ffn.experts.mlp.w2", {E * F, D});
  const auto at = [](const std::vector<float>& v, std::int64_t i) { return v[static_cast<std::size_t>(i)]; };
  for (std::int64_t i = 0; i < kv * D; ++i) {
    EXPECT_EQ(at(qkv, i), test::pseudo_random("layers.1.attn.q_NHD", i));
    EXPECT_EQ(at(qkv, q * D + i), test::pseudo_random("layers.1.attn.k_NHD", i));
    EXPECT_EQ(at(qkv, (q + kv) * D + i), test::pseudo_random("layers.1.attn.v_NHD", i));
  }
  for (std::int64_t e = 0; e < E; ++e)
    for (std::int64_t f = 0; f < F; ++f)
      for (std::int64_t d = 0; d < D; ++d) {
        const std::int64_t row = e * F + f;
        EXPECT_EQ(at(up, row * D + d),
                  test::pseudo_random("layers.1.moe.gate_up_EF2D", (row * 2 + 1) * D + d));
        EXPECT_EQ(at(down, row * D + d), test::pseudo_random("layers.1.moe.down_EDF", (e * D + d) * F + f));
      }
}

TEST(FamilyTensors, ConfigsAreReadAsTheyAreWritten) {
  for (const Family* family : families()) {
    const ModelConfig written = model_of(*family);
    const ModelConfig read = parse_model_config(to_hf_json(written), family->model_type);
    EXPECT_EQ(to_hf_json(read), to_hf_json(written));
    EXPECT_EQ(read.model_type, family->model_type);
    EXPECT_EQ(read.num_moe_layers(), written.num_moe_layers()) << family->model_type;
    EXPECT_EQ(read.num_moe_layers() > 0, is_mixture(*family)) << family->model_type;
    EXPECT_EQ(count_params(read).total, count_params(written).total) << family->model_type;
    EXPECT_EQ(read.norm_topk_prob, written.norm_topk_prob) << family->model_type;
    EXPECT_EQ(traits_of(read).words(), traits_of(written).words()) << family->model_type;
    EXPECT_EQ(read.clip_qkv, written.clip_qkv) << family->model_type;
    EXPECT_EQ(read.rms_norm_eps, written.rms_norm_eps) << family->model_type;
    EXPECT_EQ(read.router, written.router) << family->model_type;
    EXPECT_EQ(read.router_bias, written.router_bias) << family->model_type;
  }
}

// Positions that are scaled, and whatever else no layer here computes, under every name that files have for it.
TEST(FamilyTensors, WhatWouldChangeTheFunctionIsRefusedByEachFamily) {
  using nlohmann::json;
  const std::vector<std::pair<const char*, json>> others{{"partial_rotary_factor", 0.5},
                                                         {"attention_dropout", 0.1},
                                                         {"final_logit_softcapping", 30.0},
                                                         {"attn_logit_softcapping", 50.0},
                                                         {"logit_scale", 0.5},
                                                         {"is_causal", false},
                                                         {"alibi", true},
                                                         {"layer_types", {"sliding_attention"}},
                                                         {"quantization_config", {{"bits", 4}}}};
  for (const Family* family : families()) {
    SCOPED_TRACE(family->model_type);
    const json own = json::parse(to_hf_json(model_of(*family)));
    EXPECT_EQ(test::refusal(own), "");
    for (const char* type : {"llama3", "yarn", "linear", "dynamic", "longrope", "ntk"})
      for (const char* key : {"rope_scaling", "rope_parameters"}) {
        const json rope{{"rope_type", type}, {"rope_theta", own.value("rope_theta", 1e4)}, {"factor", 8.0}};
        EXPECT_THAT(test::refusal(test::with(own, key, rope)), HasSubstr(fmt::format("'{}'", type))) << key;
        const json old{{"type", type}, {"factor", 8.0}};
        EXPECT_THAT(test::refusal(test::with(own, key, old)), HasSubstr(fmt::format("'{}'", type))) << key;
      }
    json all = own;
    for (const auto& [key, value] : others) {
      EXPECT_THAT(test::refusal(test::with(own, key, value)), HasSubstr(fmt::format("{}: ", key)));
      all[key] = value;
    }
    const std::string together = test::refusal(all);
    EXPECT_THAT(together, HasSubstr(fmt::format("{} problems", others.size())));
    for (const auto& [key, value] : others) EXPECT_THAT(together, HasSubstr(fmt::format("{}: ", key)));
  }
}

// A run may give the routers of any family any form: what its files have no words for is told in others, and only
// checkpoints have those.
void expect_router_is_kept(const Family& family, const ModelConfig& config) {
  const Traits lost = traits_of(config).without(family.carries);
  const std::string text = to_hf_json(config), why = why_not_exported(config);
  const ModelConfig read = parse_model_config(text, family.model_type);
  EXPECT_EQ(read.router, config.router);
  EXPECT_EQ(read.router_bias, config.router_bias);
  EXPECT_EQ(lost.none(), text.find("upmoe_router") == std::string::npos);
  EXPECT_EQ(lost.without({Trait::kChoiceBias}).none(), why.empty());
  if (lost.has(Trait::kSigmoidScores)) {
    EXPECT_THAT(why, AllOf(HasSubstr("scores of a sigmoid"), HasSubstr("other experts")));
  }
}

TEST(FamilyTensors, RoutersOfAnyFormAreReadAsTheyAreWritten) {
  for (const Family* family : families()) {
    if (!is_mixture(*family)) continue;
    SCOPED_TRACE(family->model_type);
    const ModelConfig own = model_of(*family);
    EXPECT_THAT(to_hf_json(own), Not(HasSubstr("upmoe_router")));
    EXPECT_EQ(why_not_exported(own), "");
    for (const RouterScore score : {RouterScore::kSoftmax, RouterScore::kSigmoid})
      for (const double scale : {1.0, 1.5})
        for (const bool bias : {false, true}) {
          ModelConfig c = own;
          c.router = {.score = score, .scale = scale};
          c.router_bias = own.router_bias || bias;
          expect_router_is_kept(*family, c);
        }
  }
}

TEST(FamilyTensors, OfDenseFamiliesHaveMixturesThatAreSome) {
  for (const Family* family : families()) {
    for (const char* name : family->mixtures) {
      ASSERT_NE(find_family(name), nullptr) << name;
      EXPECT_TRUE(is_mixture(*find_family(name))) << name;
      EXPECT_FALSE(is_mixture(*family)) << family->model_type;
    }
  }
}

// Where transformers has no form for something, a model that has it is not written as if it had not.
TEST(FamilyTensors, NothingIsWrittenThatAFamilyDoesNotCarry) {
  for (const Family* family : families()) {
    ModelConfig config = model_of(*family);
    EXPECT_EQ(traits_of(config).without(family->carries).words(), "") << family->model_type;
    if (!is_mixture(*family) || family->carries.has(Trait::kUngatedShared)) continue;
    config.shared_expert_gate = false;
    config.shared_expert_intermediate_size = config.moe_intermediate_size;
    EXPECT_THROW(to_hf_json(config), Error) << family->model_type;
  }
}

}  // namespace
}  // namespace upmoe
