// config.json of Hugging Face: every form in the wild is read, and nothing is guessed.

#include "configs/model_config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "configs/families/family.h"
#include "tests/support/config_json.h"
#include "tests/support/temporary_directory.h"

namespace upmoe {
namespace {

using nlohmann::json;
using test::parse;
using test::refusal;
using test::refusal_of;
using test::with;
using test::without;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

// Qwen1.5-1.8B, as its file says it.
json dense() {
  return json::parse(
      R"({"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
    "intermediate_size": 5504, "max_position_embeddings": 32768, "max_window_layers": 21, "model_type": "qwen2",
    "num_attention_heads": 16, "num_hidden_layers": 24, "num_key_value_heads": 16, "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
    "transformers_version": "4.37.0", "use_cache": true, "use_sliding_window": false, "vocab_size": 151936})");
}
json moe() {
  json j = dense();
  j["model_type"] = "qwen2_moe";
  j["intermediate_size"] = 5632;
  j["num_experts"] = 60;
  j["num_experts_per_tok"] = 4;
  j["moe_intermediate_size"] = 1408;
  j["shared_expert_intermediate_size"] = 5632;
  j["norm_topk_prob"] = false;
  j["decoder_sparse_step"] = 1;
  j["router_aux_loss_coef"] = 0.001;
  return j;
}
TEST(ModelConfig, Dense) {
  const ModelConfig c = parse(dense());
  EXPECT_EQ(c.model_type, "qwen2");
  EXPECT_EQ(c.vocab_size, 151936);
  EXPECT_EQ(c.intermediate_size, 5504);
  EXPECT_EQ(c.head_dim, 128);
  EXPECT_EQ(c.rope_theta, 1e6);
  EXPECT_EQ(c.num_experts, 0);
  EXPECT_EQ(c.num_moe_layers(), 0);
  EXPECT_TRUE(c.qkv_bias);
}

TEST(ModelConfig, MixtureAndWhichLayers) {
  const ModelConfig c = parse(moe());
  EXPECT_EQ(c.num_moe_layers(), 24);
  EXPECT_EQ(c.num_experts_per_tok, 4);
  EXPECT_EQ(parse(with(moe(), "mlp_only_layers", nullptr)).num_moe_layers(), 24);
  EXPECT_EQ(parse(with(moe(), "mlp_only_layers", json::array())).num_moe_layers(), 24);
  const ModelConfig mixed = parse(with(with(moe(), "decoder_sparse_step", 2), "mlp_only_layers", {1, 23}));
  EXPECT_EQ(mixed.num_moe_layers(), 10);
  EXPECT_FALSE(mixed.is_moe_layer(0));
  EXPECT_FALSE(mixed.is_moe_layer(1));
  EXPECT_TRUE(mixed.is_moe_layer(3));
  EXPECT_EQ(parse(without(moe(), "decoder_sparse_step")).decoder_sparse_step, 1);
  EXPECT_EQ(parse(with(without(moe(), "num_experts"), "num_local_experts", 60)).num_experts, 60);
  EXPECT_EQ(parse(with(moe(), "shared_expert_intermediate_size", 0)).shared_expert_intermediate_size, 0);
}

TEST(ModelConfig, FormsOfDifferentVersions) {
  const json v5_rope = {{"rope_type", "default"}, {"rope_theta", 5000.0}};
  EXPECT_EQ(parse(with(without(dense(), "rope_theta"), "rope_parameters", v5_rope)).rope_theta, 5000);
  EXPECT_EQ(parse(with(with(dense(), "rope_theta", 5000), "rope_parameters", v5_rope)).rope_theta, 5000);
  EXPECT_EQ(parse(with(dense(), "rope_parameters", {{"rope_type", "default"}})).rope_theta, 1e6);
  EXPECT_EQ(parse(with(without(dense(), "torch_dtype"), "dtype", "float32")).dtype, FileDType::kFp32);
  EXPECT_EQ(parse(with(dense(), "num_key_value_heads", nullptr)).num_key_value_heads, 16);
  EXPECT_EQ(parse(with(dense(), "head_dim", 256)).head_dim, 256);
  EXPECT_EQ(parse(with(dense(), "num_key_value_heads", 4)).num_key_value_heads, 4);
  EXPECT_EQ(parse(with(dense(), "eos_token_id", {1, 2})).vocab_size, 151936);
  EXPECT_EQ(parse(with(dense(), "rope_scaling", nullptr)).rope_theta, 1e6);
}

TEST(ModelConfig, NothingEssentialIsGuessed) {
  for (const char* key :
       {"model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "max_position_embeddings", "rms_norm_eps", "rope_theta", "hidden_act"}) {
    EXPECT_THAT(refusal(without(dense(), key)),
                HasSubstr(std::string("config.json: ") + key + ": is missing"))
        << key;
  }
  for (const char* key : {"num_experts", "num_experts_per_tok", "moe_intermediate_size",
                          "shared_expert_intermediate_size", "norm_topk_prob"}) {
    EXPECT_THAT(refusal(without(moe(), key)), HasSubstr(std::string(key) + ": is missing")) << key;
  }
  EXPECT_THAT(refusal(without(dense(), "num_key_value_heads")), HasSubstr("num_key_value_heads: is missing"));
}

TEST(ModelConfig, RefusesWhatItDoesNotCompute) {
  for (const Family* family : families())
    EXPECT_THAT(refusal(with(dense(), "model_type", "gpt2")),
                AllOf(HasSubstr("'gpt2', expected "), HasSubstr(family->model_type)));
  EXPECT_THAT(refusal(with(dense(), "hidden_act", "gelu")), HasSubstr("only silu"));
  EXPECT_THAT(refusal(with(dense(), "use_sliding_window", true)), HasSubstr("sliding-window"));
  EXPECT_THAT(refusal(with(dense(), "attention_dropout", 0.1)), HasSubstr("dropout"));
  EXPECT_THAT(refusal(with(dense(), "quantization_config", {{"bits", 4}})), HasSubstr("quantised"));
  EXPECT_THAT(refusal(with(dense(), "rope_scaling", {{"type", "linear"}, {"factor", 2.0}})),
              HasSubstr("'linear'"));
  EXPECT_THAT(refusal(with(dense(), "rope_parameters", {{"rope_type", "yarn"}, {"rope_theta", 1e6}})),
              HasSubstr("'yarn'"));
  EXPECT_THAT(refusal(with(dense(), "rope_parameters", {{"partial_rotary_factor", 0.5}})), HasSubstr("0.5"));
  EXPECT_THAT(refusal(with(dense(), "rope_parameters", {{"rope_theta", 1e4}})), HasSubstr("must agree"));
  EXPECT_THAT(refusal(with(dense(), "dtype", "float32")), HasSubstr("must agree"));
  EXPECT_THAT(refusal(with(dense(), "torch_dtype", "int8")),
              HasSubstr("found 'int8', expected bfloat16 or float32 or float16"));
  EXPECT_THAT(refusal(with(moe(), "num_local_experts", 61)), HasSubstr("num_experts is 60"));
}

// Every key of a file is read, or refused, or without effect on what the model computes.
TEST(ModelConfig, WhatWouldChangeTheFunctionIsRefused) {
  const std::vector<std::tuple<const char*, json, json>> cases{
      // key, refused, without effect
      {"is_causal", false, true},
      {"use_bidirectional_attention", true, false},
      {"partial_rotary_factor", 0.5, 1.0},
      {"rotary_pct", 0.25, 1},
      {"attn_logit_softcapping", 50.0, nullptr},
      {"final_logit_softcapping", 30.0, nullptr},
      {"logit_scale", 0.0625, 1.0},
      {"embedding_multiplier", 12, 1},
      {"clip_qkv", 8, nullptr},
      {"use_qk_norm", true, false},
      {"use_dynamic_ntk", true, false},
      {"routed_scaling_factor", 2.5, 1.0},
      {"scoring_func", "sigmoid", "softmax"},
      {"topk_method", "noaux_tc", "greedy"},
      {"n_group", 8, 1},
      {"first_k_dense_replace", 1, 0},
      {"compression_config", {{"bits", 8}}, nullptr},
      {"quantization_config", {{"bits", 8}}, nullptr},
      {"attention_dropout", 0.1, 0},
      {"pruned_heads", {{"0", {1}}}, json::object()},
      {"transformers_weights", "other.safetensors", "model.safetensors"},
      {"layer_types", {"full_attention", "sliding_attention"}, {"full_attention", "full_attention"}},
      {"hidden_act", "gelu", "swish"},
  };
  for (const auto& [key, refused, neutral] : cases) {
    for (const json& base : {dense(), moe()}) {
      EXPECT_THAT(refusal(with(base, key, refused)), HasSubstr(std::string("config.json: ") + key + ": "))
          << key;
      EXPECT_EQ(refusal(with(base, key, neutral)), "") << key;
    }
  }
}

TEST(ModelConfig, AWindowIsRefusedWhereALayerHasOne) {
  json j = with(dense(), "use_sliding_window", true);
  EXPECT_THAT(refusal(j), HasSubstr("sliding-window"));  // from layer 21 of 24
  EXPECT_THAT(refusal(without(with(j, "num_hidden_layers", 29), "max_window_layers")),
              HasSubstr("sliding-window"));  // from layer 28
  EXPECT_EQ(refusal(without(j, "max_window_layers")), "");
  EXPECT_EQ(refusal(with(j, "max_window_layers", 24)), "");
  EXPECT_EQ(refusal(with(j, "sliding_window", nullptr)), "");
  EXPECT_THAT(refusal(with(with(moe(), "use_sliding_window", true), "max_window_layers", 24)),
              HasSubstr("sliding-window"));  // counted otherwise there
}

TEST(ModelConfig, RotaryBasesOfAllFormsAgree) {
  const json base = without(dense(), "rope_theta");
  const json theta = {{"rope_type", "default"}, {"rope_theta", 5000.0}};
  EXPECT_EQ(parse(with(base, "rope_parameters", theta)).rope_theta, 5000);
  EXPECT_EQ(parse(with(base, "rope_scaling", theta)).rope_theta, 5000);
  EXPECT_THAT(refusal(with(dense(), "rope_scaling", theta)), HasSubstr("must agree"));
  EXPECT_THAT(refusal(with(with(base, "rope_parameters", theta), "rope_scaling", {{"rope_theta", 1e4}})),
              HasSubstr("must agree"));
  EXPECT_THAT(refusal(with(base, "rope_parameters", {{"full_attention", theta}})),
              HasSubstr("kind of layer"));
  EXPECT_THAT(refusal(with(dense(), "rope_parameters", {{"mrope_section", {16, 24, 24}}})),
              HasSubstr("mrope_section"));
}

TEST(ModelConfig, RefusesImpossibleShapes) {
  EXPECT_THAT(refusal(with(dense(), "num_attention_heads", 15)), HasSubstr("does not divide hidden_size"));
  EXPECT_THAT(refusal(with(dense(), "num_key_value_heads", 3)),
              HasSubstr("does not divide num_attention_heads"));
  EXPECT_THAT(refusal(with(dense(), "head_dim", 127)), HasSubstr("odd"));
  EXPECT_THAT(refusal(with(moe(), "num_experts_per_tok", 61)), HasSubstr("61 of 60"));
  EXPECT_THAT(refusal(with(moe(), "mlp_only_layers", {24})), HasSubstr("0 to 23"));
  EXPECT_THAT(refusal(with(moe(), "mlp_only_layers", {1, 1})), HasSubstr("twice"));
  EXPECT_THAT(refusal(with(moe(), "mlp_only_layers", "all")), HasSubstr("list"));
  EXPECT_THAT(refusal(with(moe(), "decoder_sparse_step", 0)), HasSubstr("decoder_sparse_step"));
  EXPECT_THAT(refusal(with(moe(), "num_experts", 0)), HasSubstr("num_experts"));
  EXPECT_THAT(refusal(with(dense(), "rms_norm_eps", 0)), HasSubstr("more than 0"));
  EXPECT_THAT(refusal(with(dense(), "rope_theta", -1)), HasSubstr("more than 0"));
}

// The JSON library would turn each of these into some number.
TEST(ModelConfig, RefusesNumbersThatWouldWrap) {
  const std::string text = dense().dump();
  const auto hidden = [&](const std::string& value) {
    std::string changed = text;
    const std::string key = "\"hidden_size\":";
    const auto at = changed.find(key) + key.size();
    return refusal_of(changed.replace(at, 4, value));
  };
  for (const char* value : {"-1", "0", "1.9", "2048.0", "2e3", "4294969344", "18446744073709551615",
                            "18446744073709553664", "1e400", "\"2048\"", "true", "[2048]", "null"}) {
    EXPECT_THAT(hidden(value), AllOf(HasSubstr("config.json"), Not(HasSubstr("unexpected")))) << value;
  }
  EXPECT_THAT(hidden("4294969344"), HasSubstr("hidden_size: found 4294969344"));
}

TEST(ModelConfig, RefusesBrokenFiles) {
  EXPECT_THAT(refusal_of(""), HasSubstr("not valid JSON"));
  EXPECT_THAT(refusal_of("{"), HasSubstr("not valid JSON"));
  EXPECT_THAT(refusal_of("[]"), HasSubstr("expected a JSON object"));
  EXPECT_THAT(refusal_of("{} x"), HasSubstr("not valid JSON: parse error at line 1"));
  EXPECT_THAT(refusal_of(R"({"a": 1, "a": 1})"), HasSubstr("'a' is given twice"));
  EXPECT_THAT(refusal_of(R"({"x": {"a": 1, "a": 1}})"), HasSubstr("'a' is given twice"));
  EXPECT_THAT(refusal_of("{\"a\": " + std::string(100000, '[')), HasSubstr("deeper"));
  EXPECT_THAT(refusal_of("{\"a\": \"\xff\"}"), HasSubstr("UTF-8"));
}

// It need not be there: what it is called says what it is.
TEST(ModelConfig, RefusesARunsFile) {
  try {
    read_model_config("run.yaml");
    ADD_FAILURE() << "no error";
  } catch (const Error& e) {
    EXPECT_THAT(e.what(), AllOf(HasSubstr("run.yaml: a YAML file"), HasSubstr("model.path")));
  }
}

TEST(ModelConfig, AllProblemsAtOnce) {
  const std::string message =
      refusal(with(with(without(moe(), "vocab_size"), "hidden_size", -1), "hidden_act", "relu"));
  EXPECT_THAT(message, AllOf(HasSubstr("3 problems"), HasSubstr("vocab_size: is missing"),
                             HasSubstr("found -1"), HasSubstr("'relu'")));
}

TEST(ModelConfig, ReadsDirectoriesAndNamesTheFile) {
  const test::TemporaryDirectory folder;
  const std::filesystem::path& dir = folder.path();
  std::ofstream(dir / "config.json") << moe();
  EXPECT_EQ(read_model_config(dir).num_experts, 60);
  EXPECT_EQ(read_model_config(dir / "config.json").num_experts, 60);
  std::filesystem::remove(dir / "config.json");
  try {
    read_model_config(dir);
    FAIL();
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ExitCode::kBadInput);
    EXPECT_THAT(e.what(), HasSubstr((dir / "config.json").string()));
  }
}

TEST(ModelConfig, TheGoldenModelsAreRead) {
  int count = 0;
  for (const auto& entry :
       std::filesystem::directory_iterator(std::string(UPMOE_SOURCE_DIR) + "/tests/golden")) {
    if (!entry.is_directory()) continue;
    EXPECT_NO_THROW(read_model_config(entry.path())) << entry.path();
    ++count;
  }
  EXPECT_EQ(count, 15);
}

TEST(ModelConfig, WritesBothForms) {
  const json out = json::parse(to_hf_json(parse(moe())));
  EXPECT_EQ(out["architectures"], json::array({"Qwen2MoeForCausalLM"}));
  EXPECT_EQ(out["rope_theta"], 1e6);
  EXPECT_EQ(out["rope_parameters"], (json{{"rope_type", "default"}, {"rope_theta", 1e6}}));
  EXPECT_EQ(out["torch_dtype"], "bfloat16");
  EXPECT_EQ(out["dtype"], "bfloat16");
  EXPECT_EQ(out["mlp_only_layers"], json::array());
  EXPECT_EQ(out["norm_topk_prob"], false);
  EXPECT_EQ(out["output_router_logits"], false);
  EXPECT_FALSE(out.contains("head_dim"));
  EXPECT_EQ(out["transformers_version"], "4.37.0");  // keys that we do not know are carried along
  EXPECT_EQ(out["bos_token_id"], 151643);
}

TEST(ModelConfig, WhatIsWrittenReadsBack) {
  for (const json& source :
       {dense(), moe(), with(moe(), "mlp_only_layers", {0, 5}), with(dense(), "head_dim", 64),
        with(moe(), "qkv_bias", false), with(dense(), "tie_word_embeddings", true),
        with(without(moe(), "num_experts"), "num_local_experts", 60)}) {
    const ModelConfig first = parse(source);
    const std::string text = to_hf_json(first);
    const ModelConfig again = parse_model_config(text, "again");
    EXPECT_EQ(to_hf_json(again), text);
    EXPECT_EQ(again.head_dim, first.head_dim);
    EXPECT_EQ(again.qkv_bias, first.qkv_bias);
    EXPECT_EQ(again.mlp_only_layers, first.mlp_only_layers);
    EXPECT_EQ(again.num_experts, first.num_experts);
    EXPECT_FALSE(json::parse(text).contains("num_local_experts"));
  }
}

TEST(ModelConfig, ADenseFileCarriesNoExperts) {
  ModelConfig c = parse(moe());
  c.model_type = "qwen2";
  c.num_experts = 0;
  const json out = json::parse(to_hf_json(c));
  for (const char* key : {"num_experts", "moe_intermediate_size", "norm_topk_prob"})
    EXPECT_FALSE(out.contains(key));
}

}  // namespace
}  // namespace upmoe
