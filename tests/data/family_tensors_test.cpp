// What holds for every family: its tensors hold every parameter once, and its config.json says again what was read.

#include <gtest/gtest.h>

#include <set>

#include "configs/families/family.h"
#include "data/hf_model.h"

namespace upmoe {
namespace {

bool is_mixture(const Family& family) {
  return std::any_of(family.tensors.begin(), family.tensors.end(),
                     [](const TensorName& t) { return t.role == Role::kRouter; });
}

ModelConfig model_of(const Family& family) {
  ModelConfig c;
  c.model_type = family.model_type;
  c.vocab_size = 11;
  c.hidden_size = 8;
  c.intermediate_size = 12;
  c.num_hidden_layers = 3;
  c.num_attention_heads = 4;
  c.num_key_value_heads = 2;
  c.head_dim = 2;
  c.max_position_embeddings = 64;
  if (family.layers != nullptr) family.layers(c);
  if (!is_mixture(family)) return c;
  c.num_experts = 3;
  c.num_experts_per_tok = 2;
  c.moe_intermediate_size = 6;
  c.shared_expert_intermediate_size = 10;
  c.mlp_only_layers = {1};
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
    EXPECT_EQ(read.is_moe_layer(0), is_mixture(*family));
    EXPECT_FALSE(read.is_moe_layer(1));
  }
}

TEST(FamilyTensors, OfDenseFamiliesHaveAMixtureThatIsOne) {
  for (const Family* family : families()) {
    if (family->mixture == nullptr) {
      EXPECT_THROW(mixture_of(*family), Error);
      continue;
    }
    EXPECT_FALSE(is_mixture(*family)) << family->model_type;
    EXPECT_TRUE(is_mixture(mixture_of(*family))) << family->model_type;
    EXPECT_NE(mixture_of(*family).from_dense, nullptr) << family->model_type;
  }
}

}  // namespace
}  // namespace upmoe
