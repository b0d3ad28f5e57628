// config.json of the mixtures beside Qwen2's: what each says beside the common keys, and what it refuses.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "configs/model_config.h"
#include "kernels/core/check.h"

namespace upmoe {
namespace {

using nlohmann::json;
using ::testing::AllOf;
using ::testing::HasSubstr;

json with(json j, const std::string& key, json value) {
  j[key] = std::move(value);
  return j;
}
json without(json j, const std::string& key) {
  j.erase(key);
  return j;
}
ModelConfig parse(const json& j) {
  return parse_model_config(j.dump(), "config.json");
}
std::string refusal(const json& j) {
  try {
    parse(j);
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ExitCode::kBadInput);
    return e.what();
  }
  return "";
}

// What all files say alike, and Mixtral's say beside it.
json mixtral() {
  json j = json::parse(R"({"hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
    "intermediate_size": 5504, "max_position_embeddings": 32768, "num_attention_heads": 16, "num_hidden_layers": 24,
    "num_key_value_heads": 16, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "tie_word_embeddings": false,
    "torch_dtype": "bfloat16", "vocab_size": 151936})");
  j["model_type"] = "mixtral";
  j["num_local_experts"] = 8;
  j["num_experts_per_tok"] = 2;
  return j;
}

json deepseek() {
  json j = mixtral();
  j["model_type"] = "deepseek";
  j.erase("num_local_experts");
  j["n_routed_experts"] = 64;
  j["n_shared_experts"] = 2;
  j["num_experts_per_tok"] = 6;
  j["moe_intermediate_size"] = 1408;
  j["first_k_dense_replace"] = 1;
  return j;
}

// dots.llm1, as transformers writes it.
json dots1() {
  json j = deepseek();
  j["model_type"] = "dots1";
  j["hidden_size"] = 4096;
  j["num_attention_heads"] = j["num_key_value_heads"] = 32;
  j["num_hidden_layers"] = j["max_window_layers"] = 62;
  j["n_routed_experts"] = 128;
  j["norm_topk_prob"] = true;
  j["n_group"] = j["topk_group"] = 1;
  j["routed_scaling_factor"] = 2.5;
  j["attention_bias"] = false;
  j["sliding_window"] = 4096;
  return j;
}

TEST(MoeFamilies, MixtralsExpertsHaveTheWidthOfItsFfn) {
  const ModelConfig c = parse(mixtral());
  EXPECT_EQ(c.num_experts, 8);
  EXPECT_EQ(c.moe_intermediate_size, c.intermediate_size);
  EXPECT_EQ(c.shared_expert_intermediate_size, 0);
  EXPECT_TRUE(c.norm_topk_prob);
  EXPECT_FALSE(c.qkv_bias);
  EXPECT_EQ(c.num_moe_layers(), c.num_hidden_layers);
}

TEST(MoeFamilies, DeepseeksFirstLayersAreDenseAndItsSharedExpertsOne) {
  const ModelConfig c = parse(deepseek());
  EXPECT_EQ(c.shared_expert_intermediate_size, 2816);
  EXPECT_FALSE(c.shared_expert_gate);
  EXPECT_FALSE(c.norm_topk_prob);
  EXPECT_FALSE(c.is_moe_layer(0));
  EXPECT_EQ(c.num_moe_layers(), c.num_hidden_layers - 1);
  EXPECT_EQ(parse(without(deepseek(), "n_shared_experts")).shared_expert_intermediate_size, 0);
  EXPECT_EQ(parse(with(deepseek(), "n_shared_experts", nullptr)).shared_expert_intermediate_size, 0);
  EXPECT_TRUE(parse(with(deepseek(), "norm_topk_prob", true)).norm_topk_prob);
  json one = with(deepseek(), "norm_topk_prob", true);
  one["num_experts_per_tok"] = 1;
  EXPECT_FALSE(parse(one).norm_topk_prob) << "a single expert keeps its probability there";
}

TEST(MoeFamilies, Dots1sRoutersScoreBySigmoidsAndChooseByBiases) {
  const ModelConfig c = parse(dots1());
  EXPECT_EQ(c.router, (RouterForm{.score = RouterScore::kSigmoid, .scale = 2.5}));
  EXPECT_TRUE(c.router_bias);
  EXPECT_EQ(c.qk_norm, QkNorm::kPerHead);
  EXPECT_FALSE(c.qkv_bias);
  EXPECT_EQ(c.head_dim, 128);
  EXPECT_EQ(c.shared_expert_intermediate_size, 2816);
  EXPECT_FALSE(c.shared_expert_gate);
  EXPECT_EQ(c.num_moe_layers(), 61);
  EXPECT_EQ(parse(with(dots1(), "n_shared_experts", 0)).shared_expert_intermediate_size, 0);
  EXPECT_THAT(refusal(without(dots1(), "n_shared_experts")), HasSubstr("n_shared_experts: is missing"));
  json j = dots1();
  j["n_group"] = 8;
  j["topk_group"] = 4;
  j["head_dim"] = 64;
  j["scoring_func"] = "sigmoid";
  j["topk_method"] = "noaux_tc";
  j["moe_layer_freq"] = 1;
  EXPECT_EQ(parse(j).router, (RouterForm{RouterScore::kSigmoid, 8, 4, 2.5}));
  EXPECT_EQ(parse(j).head_dim, 64);
  // What transformers takes where a file does not say it.
  for (const char* key :
       {"norm_topk_prob", "routed_scaling_factor", "first_k_dense_replace", "n_group", "topk_group"})
    j.erase(key);
  const ModelConfig bare = parse(j);
  EXPECT_FALSE(bare.norm_topk_prob);
  EXPECT_EQ(bare.router, (RouterForm{.score = RouterScore::kSigmoid}));
  EXPECT_EQ(bare.num_moe_layers(), 62);
}

// Without a word of it, transformers gives the layers from the 62nd on a window of 4096.
TEST(MoeFamilies, Dots1sWindowIsRefusedWhereALayerHasOne) {
  json j = dots1();
  EXPECT_THAT(refusal(with(j, "max_window_layers", 61)), HasSubstr("layers from 61 on"));
  EXPECT_EQ(refusal(with(with(j, "max_window_layers", 0), "sliding_window", nullptr)), "");
  EXPECT_EQ(
      refusal(with(with(j, "max_window_layers", 0), "layer_types", {"full_attention", "full_attention"})),
      "");
  EXPECT_THAT(refusal(with(j, "layer_types", {"full_attention", "sliding_attention"})),
              HasSubstr("only full_attention"));
  j = without(without(with(j, "num_hidden_layers", 63), "sliding_window"), "max_window_layers");
  EXPECT_THAT(refusal(j), HasSubstr("layers from 62 on"));
  ModelConfig deep = parse(dots1());
  deep.num_hidden_layers = 70;
  EXPECT_EQ(refusal(json::parse(to_hf_json(deep))), "") << "what is written says that there is none";
}

TEST(MoeFamilies, Dots1sContradictionsAreListedTogether) {
  json j = dots1();
  j["scoring_func"] = "softmax";
  j["topk_method"] = "greedy";
  j["moe_layer_freq"] = 2;
  j["attention_bias"] = true;
  j["num_local_experts"] = 64;
  j["n_group"] = 65;
  EXPECT_THAT(refusal(j),
              AllOf(HasSubstr("6 problems"), HasSubstr("routers are 'sigmoid'"),
                    HasSubstr("routers are 'noaux_tc'"), HasSubstr("moe_layer_freq"), HasSubstr("biases"),
                    HasSubstr("n_routed_experts is 128"), HasSubstr("n_group")));
  EXPECT_THAT(refusal(with(dots1(), "n_group", 3)), HasSubstr("128 experts are not 3 groups"));
  EXPECT_THAT(refusal(with(dots1(), "topk_group", 2)), HasSubstr("2 of 1 groups"));
  EXPECT_THAT(refusal(with(dots1(), "n_group", 32)), HasSubstr("1 groups hold 4 experts"));
  EXPECT_THAT(refusal(with(dots1(), "n_routed_experts", 1)), HasSubstr("6 of 1 experts"));
  EXPECT_THAT(refusal(with(dots1(), "routed_scaling_factor", 0)), HasSubstr("more than 0"));
}

// DBRX, as its publisher's file says it.
json dbrx() {
  return json::parse(
      R"({"model_type": "dbrx", "d_model": 6144, "n_heads": 48, "n_layers": 40, "max_seq_len": 32768,
    "vocab_size": 100352, "initializer_range": 0.02, "emb_pdrop": 0.0, "resid_pdrop": 0.0, "tie_word_embeddings": false,
    "torch_dtype": "bfloat16", "attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "model_type": "", "rope_theta": 500000},
    "ffn_config": {"ffn_hidden_size": 10752, "model_type": "", "moe_jitter_eps": 0, "moe_loss_weight": 0.05,
    "moe_num_experts": 16, "moe_top_k": 4}})");
}
json with_in(json j, const char* object, const char* key, json value) {
  j[object][key] = std::move(value);
  return j;
}

TEST(MoeFamilies, DbrxHasLayerNormsAndALimit) {
  const ModelConfig c = parse(dbrx());
  EXPECT_EQ(c.norm, NormKind::kLayerNorm);
  EXPECT_EQ(c.rms_norm_eps, 1e-5);
  EXPECT_EQ(c.clip_qkv, 8);
  EXPECT_EQ(c.head_dim, 128);
  EXPECT_EQ(c.num_key_value_heads, 8);
  EXPECT_EQ(c.rope_theta, 500000);
  EXPECT_EQ(c.num_experts, 16);
  EXPECT_EQ(c.num_experts_per_tok, 4);
  EXPECT_EQ(c.moe_intermediate_size, 10752);
  EXPECT_EQ(c.shared_expert_intermediate_size, 0);
  EXPECT_EQ(c.router_aux_loss_coef, 0.05);
  EXPECT_TRUE(c.norm_topk_prob);
  EXPECT_FALSE(c.qkv_bias);
  EXPECT_EQ(c.num_moe_layers(), 40);
  EXPECT_TRUE(parse(with_in(dbrx(), "ffn_config", "moe_normalize_expert_weights", 1)).norm_topk_prob);
  EXPECT_FALSE(parse(with_in(dbrx(), "ffn_config", "moe_normalize_expert_weights", nullptr)).norm_topk_prob);
  EXPECT_EQ(refusal(with_in(dbrx(), "ffn_config", "ffn_act_fn", {{"name", "silu"}})), "");
}

// transformers turns by what stands beside attn_config, or by 10000: what is written says it in both places.
TEST(MoeFamilies, DbrxsBasesAgree) {
  const json beside = {{"rope_type", "default"}, {"rope_theta", 10000.0}};
  EXPECT_THAT(refusal(with(dbrx(), "rope_parameters", beside)), HasSubstr("must agree"));
  EXPECT_EQ(
      parse(with(with_in(dbrx(), "attn_config", "rope_theta", 1e4), "rope_parameters", beside)).rope_theta,
      1e4);
  const json written = json::parse(to_hf_json(parse(dbrx())));
  EXPECT_EQ(written["rope_parameters"]["rope_theta"], 500000.0);
  EXPECT_EQ(written["attn_config"]["rope_theta"], 500000.0);
}

TEST(MoeFamilies, DbrxsContradictionsAreListedTogether) {
  json j = dbrx();
  j["tie_word_embeddings"] = true;
  j["resid_pdrop"] = 0.1;
  j["attn_config"]["clip_qkv"] = 0;
  j["attn_config"]["kv_n_heads"] = 7;
  j["ffn_config"]["moe_normalize_expert_weights"] = 2;
  j["ffn_config"]["moe_jitter_eps"] = 0.01;
  j["ffn_config"]["ffn_act_fn"] = {{"name", "gelu"}};
  EXPECT_THAT(refusal(j), AllOf(HasSubstr("7 problems"), HasSubstr("not the embedding"), HasSubstr("dropout"),
                                HasSubstr("clip_qkv"), HasSubstr("7 does not divide n_heads = 48"),
                                HasSubstr("by their sum (1)"), HasSubstr("noise before the router"),
                                HasSubstr("'gelu', only silu")));
  for (const char* key : {"d_model", "n_heads", "n_layers", "max_seq_len", "attn_config", "ffn_config"})
    EXPECT_THAT(refusal(without(dbrx(), key)), HasSubstr(std::string(key) + ": is missing")) << key;
  for (const char* key : {"clip_qkv", "kv_n_heads", "rope_theta"})
    EXPECT_THAT(refusal(with_in(dbrx(), "attn_config", key, nullptr)),
                HasSubstr(std::string("attn_config: ") + key + ": is missing"));
  EXPECT_THAT(refusal(with(dbrx(), "n_heads", 36)), HasSubstr("not 36 heads"));
}

// Every key that contradicts the family or another key is told at once.
TEST(MoeFamilies, ContradictionsAreListedTogether) {
  json j = mixtral();
  j["num_experts"] = 4;
  j["norm_topk_prob"] = false;
  j["attention_bias"] = true;
  j["router_jitter_noise"] = 0.1;
  j["num_experts_per_tok"] = 9;
  EXPECT_THAT(refusal(j), AllOf(HasSubstr("5 problems"), HasSubstr("found 4, but num_local_experts is 8"),
                                HasSubstr("always renormalises"), HasSubstr("biases are not supported"),
                                HasSubstr("noise before the router"), HasSubstr("9 of 8 experts")));
  j = deepseek();
  j["moe_layer_freq"] = 2;
  j["scoring_func"] = "sigmoid";
  j["attention_bias"] = true;
  j["head_dim"] = 64;
  j["first_k_dense_replace"] = 99;
  EXPECT_THAT(refusal(j),
              AllOf(HasSubstr("5 problems"), HasSubstr("moe_layer_freq"), HasSubstr("only softmax"),
                    HasSubstr("biases"), HasSubstr("head_dim"), HasSubstr("first_k_dense_replace")));
}

}  // namespace
}  // namespace upmoe
