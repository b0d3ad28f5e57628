#include "configs/families/qwen2.h"

#include "configs/families/decoder.h"
#include "configs/families/features.h"
#include "configs/families/tensor_names.h"

namespace upmoe {
namespace {

constexpr const char* kMixtures[] = {"qwen2_moe"};

constexpr auto kTensors = together(kFrontTensors, kFfnTensors, kBackTensors);

void read(JsonObject& json, ModelConfig& c) {
  read_qwen2(json, c);
  if (window_reaches_a_layer(json, c)) refuse_window(json);
  require_full_attention(json);
  refuse_features(json, kQwen2);
}

}  // namespace

const Family kQwen2{.model_type = "qwen2",
                    .architecture = "Qwen2ForCausalLM",
                    .read = read,
                    .write = write_qwen2,
                    .keys = {},
                    .tensors = kTensors,
                    .carries = kQwen2Layers,
                    .mixtures = kMixtures};

void read_qwen2(JsonObject& json, ModelConfig& c) {
  read_sizes(json, c);
  ConfigKeys(json).truth("qkv_bias", c.qkv_bias, false);
  read_heads(json, c);
  read_rope(json, c);
  read_dtype(json, c);
  require_silu(json);
}

bool window_reaches_a_layer(JsonObject& json, const ModelConfig& c) {
  constexpr std::int64_t kDefaultMaxWindowLayers = 28;
  if (!json.truth("use_sliding_window", false).value_or(false)) return false;
  if (json.is_null("sliding_window")) return false;
  const std::int64_t first =
      json.integer("max_window_layers", 0, std::int64_t{1} << 31, false).value_or(kDefaultMaxWindowLayers);
  return first < c.num_hidden_layers;
}

void refuse_window(JsonObject& json) {
  json.refuse("use_sliding_window", "found true; sliding-window attention is not supported");
}

void write_qwen2(const ModelConfig& c, JsonWriter& json) {
  write_sizes(c, json);
  write_heads(c, json);
  if (!c.qkv_bias || json.has("qkv_bias")) json.set("qkv_bias", c.qkv_bias);
  json.set("use_sliding_window", false);
  write_attention(c, json);
  write_rope(c, json);
  write_dtype(c, json);
}

}  // namespace upmoe
