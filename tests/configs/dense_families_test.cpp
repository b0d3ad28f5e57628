// config.json of the dense families beside Qwen2: what each says beside the common keys, and what it refuses.

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/support/config_json.h"

namespace upmoe {
namespace {

using nlohmann::json;
using test::parse;
using test::refusal;
using test::with;
using test::without;
using ::testing::HasSubstr;

// What all files say alike.
json decoder(const char* model_type) {
  const json j = json::parse(
      R"({"attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "head_dim": 256, "hidden_act": "silu",
    "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 5504, "max_position_embeddings": 32768,
    "num_attention_heads": 16, "num_hidden_layers": 24, "num_key_value_heads": 16, "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0, "tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_cache": true,
    "vocab_size": 151936})");
  return with(j, "model_type", model_type);
}
json llama() {
  return with(with(decoder("llama"), "attention_bias", false), "mlp_bias", false);
}
json qwen3() {
  return with(with(decoder("qwen3"), "use_sliding_window", false), "sliding_window", nullptr);
}
json mistral() {
  return with(decoder("mistral"), "sliding_window", 4096);
}
json gemma() {
  return without(with(with(decoder("gemma"), "hidden_act", "gelu"), "hidden_activation", nullptr),
                 "tie_word_embeddings");
}

TEST(DenseFamilies, Layers) {
  for (const json& j : {llama(), qwen3(), mistral(), gemma()})
    EXPECT_FALSE(parse(j).qkv_bias) << j["model_type"];
  const ModelConfig plain = parse(llama());
  EXPECT_EQ(plain.norm, NormKind::kRms);
  EXPECT_EQ(plain.activation, Activation::kSilu);
  EXPECT_EQ(plain.qk_norm, QkNorm::kNone);
  EXPECT_FALSE(plain.scaled_embedding || plain.tie_word_embeddings || plain.sliding_window > 0);
  EXPECT_EQ(parse(qwen3()).qk_norm, QkNorm::kPerHead);
  EXPECT_EQ(parse(qwen3()).head_dim, 256);
  EXPECT_EQ(parse(mistral()).sliding_window, 4096);
  EXPECT_EQ(parse(with(mistral(), "sliding_window", nullptr)).sliding_window, 0);
  const ModelConfig c = parse(gemma());
  EXPECT_EQ(c.norm, NormKind::kRmsPlusOne);
  EXPECT_EQ(c.activation, Activation::kGeluTanh);
  EXPECT_TRUE(c.scaled_embedding);
  EXPECT_TRUE(c.tie_word_embeddings) << "without the key";
  EXPECT_FALSE(parse(with(gemma(), "tie_word_embeddings", false)).tie_word_embeddings);
  EXPECT_EQ(parse(with(gemma(), "hidden_activation", "gelu_pytorch_tanh")).activation, Activation::kGeluTanh);
}

// Its first files have neither key, and no reader takes them otherwise.
TEST(DenseFamilies, TheFirstLlamas) {
  const ModelConfig first = parse(without(without(llama(), "rope_theta"), "num_key_value_heads"));
  EXPECT_EQ(first.rope_theta, 10000);
  EXPECT_EQ(first.num_key_value_heads, first.num_attention_heads);
  EXPECT_EQ(parse(llama()).rope_theta, 1000000);
  for (const json& j : {qwen3(), mistral()}) {
    EXPECT_THAT(refusal(without(j, "rope_theta")), HasSubstr("rope_theta: is missing"));
    EXPECT_THAT(refusal(without(j, "num_key_value_heads")), HasSubstr("num_key_value_heads"));
  }
}

TEST(DenseFamilies, WhatTheyRefuse) {
  for (const json& j : {llama(), qwen3(), gemma()})
    EXPECT_THAT(refusal(with(j, "attention_bias", true)), HasSubstr("attention_bias: found true"));
  EXPECT_THAT(refusal(with(llama(), "mlp_bias", true)), HasSubstr("mlp_bias: found true"));
  for (const json& j : {llama(), qwen3(), mistral(), gemma()})
    for (const char* type : {"llama3", "yarn", "linear", "dynamic", "longrope"})
      EXPECT_THAT(refusal(with(j, "rope_scaling", {{"rope_type", type}, {"factor", 8.0}})),
                  HasSubstr(fmt::format("found '{}'", type)));
  for (const json& j : {llama(), qwen3(), mistral()})
    EXPECT_THAT(refusal(with(j, "hidden_act", "gelu")), HasSubstr("only silu"));
  EXPECT_THAT(refusal(with(gemma(), "hidden_act", "silu")), HasSubstr("only gelu_pytorch_tanh"));
  EXPECT_THAT(refusal(with(gemma(), "hidden_activation", "gelu_new")), HasSubstr("only gelu_pytorch_tanh"));
  EXPECT_THAT(refusal(without(mistral(), "sliding_window")),
              HasSubstr("sliding_window: is missing; transformers takes 4096"));
  EXPECT_THAT(refusal(with(mistral(), "sliding_window", 0)), HasSubstr("sliding_window"));
  EXPECT_THAT(refusal(without(qwen3(), "head_dim")),
              HasSubstr("head_dim: is missing; transformers takes 128"));
  EXPECT_THAT(refusal(without(gemma(), "head_dim")),
              HasSubstr("head_dim: is missing; transformers takes 256"));
  const json window = with(with(qwen3(), "use_sliding_window", true), "sliding_window", 4096);
  EXPECT_THAT(refusal(with(window, "max_window_layers", 12)), HasSubstr("sliding-window"));
  EXPECT_EQ(refusal(with(window, "max_window_layers", 24)), "");
}

// What a family's readers take without a key, the file says in words.
TEST(DenseFamilies, AreWrittenForEveryReader) {
  const auto written = [](const json& j) { return json::parse(to_hf_json(parse(j))); };
  EXPECT_EQ(written(llama())["architectures"], json::array({"LlamaForCausalLM"}));
  EXPECT_EQ(written(qwen3())["architectures"], json::array({"Qwen3ForCausalLM"}));
  EXPECT_EQ(written(with(qwen3(), "head_dim", 128))["head_dim"], 128) << "even where it is hidden / heads";
  EXPECT_EQ(written(mistral())["sliding_window"], 4096);
  const json full = written(with(mistral(), "sliding_window", nullptr));
  EXPECT_TRUE(full.contains("sliding_window") && full["sliding_window"].is_null());
  const json out = written(gemma());
  EXPECT_EQ(out["architectures"], json::array({"GemmaForCausalLM"}));
  EXPECT_EQ(out["hidden_act"], "gelu_pytorch_tanh");
  EXPECT_EQ(out["hidden_activation"], "gelu_pytorch_tanh");
  EXPECT_EQ(out["tie_word_embeddings"], true);
}

TEST(DenseFamilies, WhatIsWrittenReadsBack) {
  for (const json& source : {llama(), qwen3(), mistral(), with(mistral(), "sliding_window", nullptr), gemma(),
                             with(gemma(), "tie_word_embeddings", false)}) {
    const ModelConfig first = parse(source);
    const std::string text = to_hf_json(first);
    const ModelConfig again = parse_model_config(text, "again");
    EXPECT_EQ(to_hf_json(again), text);
    EXPECT_EQ(again.sliding_window, first.sliding_window);
    EXPECT_EQ(again.tie_word_embeddings, first.tie_word_embeddings);
    EXPECT_EQ(again.activation, first.activation);
    EXPECT_EQ(again.norm, first.norm);
    EXPECT_EQ(again.qk_norm, first.qk_norm);
    EXPECT_EQ(again.scaled_embedding, first.scaled_embedding);
  }
}

// A file of another family keeps none of the keys that are one's own.
TEST(DenseFamilies, OwnKeysStayBehind) {
  ModelConfig c = parse(with(gemma(), "hidden_activation", "gelu_pytorch_tanh"));
  c.model_type = "llama";
  c.activation = Activation::kSilu;
  c.norm = NormKind::kRms;
  c.scaled_embedding = false;
  const json out = json::parse(to_hf_json(c));
  EXPECT_FALSE(out.contains("hidden_activation"));
  EXPECT_EQ(out["hidden_act"], "silu");
}

}  // namespace
}  // namespace upmoe
