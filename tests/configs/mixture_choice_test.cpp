// Which family a mixture is written as, and what those are told that cannot be.

#include "configs/families/mixture_choice.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace upmoe {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

WantedMixture wanted() {
  WantedMixture w;
  ModelConfig& c = w.shape;
  c.model_type = "qwen2";
  c.vocab_size = 64;
  c.hidden_size = 32;
  c.intermediate_size = 48;
  c.num_hidden_layers = 4;
  c.num_attention_heads = c.num_key_value_heads = 4;
  c.head_dim = 8;
  c.qkv_bias = false;
  c.num_experts = 8;
  c.num_experts_per_tok = 2;
  c.moe_intermediate_size = 48;
  c.norm_topk_prob = true;
  return w;
}

MixtureChoice choose(const WantedMixture& w) {
  return choose_mixture(*find_family("qwen2"), w);
}
std::string chosen(const WantedMixture& w) {
  const MixtureChoice choice = choose(w);
  return choice.family == nullptr ? choice.problem : choice.family->model_type;
}

TEST(MixtureChoice, AutoTakesTheDenseFamilysOwn) {
  EXPECT_EQ(chosen(wanted()), "qwen2_moe");
}

TEST(MixtureChoice, NamedFamiliesAreTakenWhereTheyCarryTheRecipe) {
  for (const char* name : {"qwen2_moe", "mixtral", "deepseek"}) {
    WantedMixture w = wanted();
    w.family = name;
    EXPECT_EQ(chosen(w), name);
  }
}

TEST(MixtureChoice, WhatAFamilyLacksIsListedWithThoseThatHaveIt) {
  WantedMixture w = wanted();
  w.family = "mixtral";
  w.shape.qkv_bias = true;
  w.shape.norm_topk_prob = false;
  w.shape.shared_expert_intermediate_size = 50;
  w.shape.mlp_only_layers = {0, 2};
  EXPECT_THAT(chosen(w), AllOf(HasSubstr("target.family mixtral does not carry: biases of q, k and v; "),
                               HasSubstr("a shared expert"), HasSubstr("whose width is no multiple"),
                               HasSubstr("not renormalised"), HasSubstr("dense layers in front"),
                               HasSubstr("dense layers between"),
                               HasSubstr("families that carry this recipe: qwen2_moe")));
  w.gate = false;
  EXPECT_THAT(chosen(w), HasSubstr("no family known here carries all of this recipe"));
}

TEST(MixtureChoice, SharedExpertsHaveTheFamilysGateUnlessOneIsAskedFor) {
  WantedMixture w = wanted();
  w.shape.shared_expert_intermediate_size = 96;
  EXPECT_EQ(chosen(w), "qwen2_moe");
  w.gate = false;
  EXPECT_THAT(chosen(w), AllOf(HasSubstr("qwen2_moe does not carry: a shared expert without a gate"),
                               HasSubstr("families that carry this recipe: deepseek")));
  w.family = "deepseek";
  EXPECT_EQ(chosen(w), "deepseek");
  w.gate.reset();
  EXPECT_EQ(chosen(w), "deepseek");
  EXPECT_FALSE(in_form_of(*find_family("deepseek"), w).shared_expert_gate);
  EXPECT_TRUE(in_form_of(*find_family("qwen2_moe"), w).shared_expert_gate);
  w.gate = true;
  EXPECT_THAT(chosen(w), AllOf(HasSubstr("a gate on the shared expert"), Not(HasSubstr("dense layers"))));
}

TEST(MixtureChoice, KeptLayersInFrontAreNotThoseBetween) {
  WantedMixture w = wanted();
  w.family = "deepseek";
  w.shape.mlp_only_layers = {0, 1};
  EXPECT_EQ(chosen(w), "deepseek");
  w.shape.mlp_only_layers = {0, 2};
  EXPECT_THAT(chosen(w), AllOf(HasSubstr("between or behind"), Not(HasSubstr("in front"))));
}

// What the layers of each dense family are like decides as much as the recipe.
TEST(MixtureChoice, AutoGoesByTheDenseFamily) {
  WantedMixture w = wanted();
  const auto from = [&](const char* dense) {
    w.shape.model_type = dense;
    w.shape.qkv_bias = w.shape.model_type == "qwen2";
    w.shape.qk_norm = w.shape.model_type == "qwen3" ? QkNorm::kPerHead : QkNorm::kNone;
    const MixtureChoice choice = choose_mixture(*find_family(dense), w);
    return choice.family == nullptr ? choice.problem : choice.family->model_type;
  };
  EXPECT_EQ(from("llama"), "mixtral");
  EXPECT_EQ(from("mistral"), "mixtral");
  EXPECT_EQ(from("qwen2"), "qwen2_moe");
  EXPECT_EQ(from("qwen3"), "qwen3_moe");
  w.shape.shared_expert_intermediate_size = 96;
  EXPECT_EQ(from("llama"), "deepseek");
  EXPECT_EQ(from("qwen2"), "qwen2_moe");
  EXPECT_EQ(from("qwen3"), "dots1");
  w.shape.mlp_only_layers = {1};
  EXPECT_THAT(from("qwen3"), AllOf(HasSubstr("qwen3_moe does not carry: a shared expert"),
                                   HasSubstr("dots1 does not carry: dense layers between"),
                                   HasSubstr("no family known here carries all of this recipe")));
  w.shape.mlp_only_layers = {};
  w.shape.shared_expert_intermediate_size = 0;
  w.shape.norm_topk_prob = false;
  EXPECT_EQ(from("mistral"), "deepseek");
  w.shape.sliding_window = 16;
  EXPECT_THAT(from("mistral"),
              AllOf(HasSubstr("mixtral does not carry: weights of the chosen experts that are not"),
                    HasSubstr("deepseek does not carry: a sliding window")));
  w.shape.sliding_window = 0;
  EXPECT_THAT(from("gemma"), HasSubstr("no mixture of experts of this kind is known"));
}

// The width of a dense layer that stays is the dense model's.
TEST(MixtureChoice, AKeptLayerKeepsItsWidth) {
  WantedMixture w = wanted();
  w.shape.shared_expert_intermediate_size = 96;
  EXPECT_EQ(in_form_of(*find_family("qwen2_moe"), w).intermediate_size, 96);
  w.shape.mlp_only_layers = {3};
  EXPECT_EQ(in_form_of(*find_family("qwen2_moe"), w).intermediate_size, 48);
}

// A family's routers are part of its form, whatever those of others are like.
TEST(MixtureChoice, RoutersAreTheFamilys) {
  WantedMixture w = wanted();
  w.shape.model_type = "qwen3";
  w.shape.qk_norm = QkNorm::kPerHead;
  w.family = "dots1";
  w.shape.mlp_only_layers = {0, 1};
  const MixtureChoice choice = choose_mixture(*find_family("qwen3"), w);
  ASSERT_NE(choice.family, nullptr) << choice.problem;
  const ModelConfig moe = in_form_of(*choice.family, w);
  EXPECT_EQ(moe.router, (RouterForm{.score = RouterScore::kSigmoid}));
  EXPECT_TRUE(moe.router_bias);
  EXPECT_EQ(moe.first_k_dense_replace, 2);
  EXPECT_TRUE(moe.mlp_only_layers.empty());
  EXPECT_EQ(in_form_of(*find_family("qwen3_moe"), w).router, RouterForm{});
  w.shape.qk_norm = QkNorm::kNone;
  EXPECT_THAT(choose_mixture(*find_family("llama"), w).problem,
              HasSubstr("dots1 does not carry: q and k without norms"));
}

TEST(MixtureChoice, OneExpertOfWeightOne) {
  WantedMixture w = wanted();
  w.shape.num_experts_per_tok = 1;
  w.family = "deepseek";
  EXPECT_THAT(chosen(w), HasSubstr("a single chosen expert whose weight is 1"));
}

}  // namespace
}  // namespace upmoe
