// What holds for every family: its tensors hold every parameter once, and its config.json says again what was read.

#include <gtest/gtest.h>

#include <set>

#include "configs/families/family.h"
#include "data/hf_model.h"

namespace upmoe {
namespace {

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
  if (carries(Trait::kDenseFirst)) c.mlp_only_layers = {0};
  if (carries(Trait::kDenseBetween)) c.mlp_only_layers = {1};
  if (family.from_dense != nullptr) family.from_dense(c);
  return c;
}

TEST(FamilyTensors, HoldEveryElementOnce) {
  for (const Family* family : families()) {
    const ModelConfig config = model_of(*family);
    std::set<std::string> names;
    for (const ParamSpec& p : make_param_table(config)) {
      std::vector<int> held(static_cast<std::size_t>(p.shape.elements()), 0);
      for (const HfTensor& t : hf_tensors_of(config, p)) {
        EXPECT_TRUE(names.insert(t.name).second) << t.name;
        EXPECT_EQ(t.elements(), t.part.elements()) << t.name;
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
    std::set<std::string> all;
    for (const HfTensor& t : hf_tensors_of(config)) all.insert(t.name);
    EXPECT_EQ(all, names) << family->model_type;
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
