#include "configs/model_config.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdlib>
#include <limits>

#include "configs/json_reader.h"
#include "configs/model_features.h"
#include "configs/model_folder.h"

namespace upmoe {
namespace {

// Far beyond every model that exists, and small enough that products of three cannot overflow 64 bits.
constexpr std::int64_t kMaxWidth = 1 << 20, kMaxLayers = 10'000, kMaxHeads = 1 << 16, kMaxExperts = 1 << 16;
constexpr std::int64_t kMaxVocab = 1 << 26, kMaxPositions = std::numeric_limits<std::int32_t>::max();

// Reads into `target` when the key is there and right; problems are in the list otherwise.
class Fields {
 public:
  explicit Fields(JsonObject& json) : json_(json) {}
  template <class T>
  void integer(const std::string& key, T& target, std::int64_t least, std::int64_t most,
               bool required = true) {
    if (const auto v = json_.integer(key, least, most, required)) target = static_cast<T>(*v);
  }
  void number(const std::string& key, double& target, bool required, bool may_be_zero) {
    const auto v = json_.number(key, required);
    if (!v) return;
    if (*v < 0 || (*v == 0 && !may_be_zero)) {
      json_.refuse(key, fmt::format("found {}, expected {}", *v, may_be_zero ? "at least 0" : "more than 0"));
      return;
    }
    target = *v;
  }
  void truth(const std::string& key, bool& target, bool required) {
    if (const auto v = json_.truth(key, required)) target = *v;
  }

 private:
  JsonObject& json_;
};

// The base of one rope description; anything that would change the angles is refused.
std::optional<double> rope_of(const std::string& text, const std::string& where, Problems& problems) {
  JsonObject rope(text, where, problems);
  for (const char* key : {"rope_type", "type"}) {
    const auto type = rope.text(key, false);
    if (type && *type != "default") {
      rope.refuse(key, fmt::format("found '{}'; position scaling is not supported, only 'default'", *type));
    }
  }
  const auto share = rope.number("partial_rotary_factor", false);
  if (share && *share != 1.0) {
    rope.refuse("partial_rotary_factor", fmt::format("found {}, only 1 is supported", *share));
  }
  const auto factor = rope.number("factor", false);
  if (factor && *factor != 1.0) rope.refuse("factor", fmt::format("found {}, only 1 is supported", *factor));
  for (const char* layers : {"full_attention", "sliding_attention"}) {
    if (rope.has(layers)) rope.refuse(layers, "positions by kind of layer are not supported");
  }
  if (rope.has("mrope_section")) rope.refuse("mrope_section", "positions of images are not supported");
  return rope.number("rope_theta", false);
}

// The form of transformers v4 (rope_theta beside rope_scaling) and that of v5 (rope_parameters) say the same
// thing, or the file is wrong: each version would take another one of two values.
void read_rope(JsonObject& json, const std::string& where, ModelConfig& c, Problems& problems) {
  std::optional<double> theta = json.number("rope_theta", false);
  std::string found_in = "rope_theta";
  for (const char* key : {"rope_parameters", "rope_scaling"}) {
    const auto text = json.object(key);
    if (!text) continue;
    const auto nested = rope_of(*text, where + ": " + key, problems);
    if (theta && nested && *theta != *nested) {
      json.refuse(found_in,
                  fmt::format("found {}, but {}.rope_theta is {}; they must agree", *theta, key, *nested));
    }
    if (theta || !nested) continue;
    theta = nested;
    found_in = fmt::format("{}.rope_theta", key);
  }
  if (!theta) {
    json.refuse("rope_theta",
                "is missing, and rope_parameters.rope_theta too; transformers takes 10000 then");
    return;
  }
  c.rope_theta = *theta;
  if (!(c.rope_theta > 0))
    json.refuse("rope_theta", fmt::format("found {}, expected more than 0", c.rope_theta));
}

void read_dtype(JsonObject& json, ModelConfig& c) {
  const auto v4 = json.text("torch_dtype", false), v5 = json.text("dtype", false);
  if (v4 && v5 && *v4 != *v5) {
    json.refuse("dtype", fmt::format("found '{}', but torch_dtype is '{}'; they must agree", *v5, *v4));
  }
  if (v4 || v5) c.dtype = v5 ? *v5 : *v4;
  if (c.dtype != "bfloat16" && c.dtype != "float32" && c.dtype != "float16") {
    json.refuse("dtype", fmt::format("found '{}', expected bfloat16, float32 or float16", c.dtype));
  }
}

void read_heads(JsonObject& json, ModelConfig& c) {
  Fields f(json);
  f.integer("num_attention_heads", c.num_attention_heads, 1, kMaxHeads);
  if (json.is_null("num_key_value_heads")) {
    c.num_key_value_heads = c.num_attention_heads;  // what null means in transformers
  } else {
    f.integer("num_key_value_heads", c.num_key_value_heads, 1, kMaxHeads);
  }
  const int heads = c.num_attention_heads, kv = c.num_key_value_heads;
  if (heads > 0 && kv > 0 && heads % kv != 0) {
    json.refuse("num_key_value_heads", fmt::format("{} does not divide num_attention_heads = {}", kv, heads));
  }
  if (json.has("head_dim")) {
    f.integer("head_dim", c.head_dim, 2, kMaxWidth);
  } else if (heads > 0 && c.hidden_size > 0) {
    if (c.hidden_size % heads != 0) {
      json.refuse("num_attention_heads",
                  fmt::format("{} does not divide hidden_size = {}", heads, c.hidden_size));
      return;
    }
    c.head_dim = c.hidden_size / heads;
  }
  if (c.head_dim % 2 != 0) {
    json.refuse("head_dim", fmt::format("{} is odd; rotary positions turn pairs of numbers", c.head_dim));
  }
}

void read_experts(JsonObject& json, ModelConfig& c) {
  Fields f(json);
  const bool v5 = json.has("num_local_experts") && !json.has("num_experts");
  f.integer(v5 ? "num_local_experts" : "num_experts", c.num_experts, 1, kMaxExperts);
  if (json.has("num_local_experts") && json.has("num_experts")) {
    int other = c.num_experts;
    f.integer("num_local_experts", other, 1, kMaxExperts);
    if (other != c.num_experts) {
      json.refuse("num_local_experts", fmt::format("found {}, but num_experts is {}", other, c.num_experts));
    }
  }
  f.integer("num_experts_per_tok", c.num_experts_per_tok, 1, kMaxExperts);
  if (c.num_experts > 0 && c.num_experts_per_tok > c.num_experts) {
    json.refuse("num_experts_per_tok",
                fmt::format("{} of {} experts cannot be chosen", c.num_experts_per_tok, c.num_experts));
  }
  f.integer("moe_intermediate_size", c.moe_intermediate_size, 1, kMaxWidth);
  f.integer("shared_expert_intermediate_size", c.shared_expert_intermediate_size, 0, kMaxWidth);
  f.integer("decoder_sparse_step", c.decoder_sparse_step, 1, kMaxLayers, false);
  f.truth("norm_topk_prob", c.norm_topk_prob, true);
  f.number("router_aux_loss_coef", c.router_aux_loss_coef, false, true);
  const std::int64_t last = std::max(0, c.num_hidden_layers - 1);
  if (const auto layers = json.integers("mlp_only_layers", 0, last)) {
    for (std::int64_t layer : *layers) c.mlp_only_layers.push_back(static_cast<int>(layer));
    std::sort(c.mlp_only_layers.begin(), c.mlp_only_layers.end());
    if (std::adjacent_find(c.mlp_only_layers.begin(), c.mlp_only_layers.end()) != c.mlp_only_layers.end()) {
      json.refuse("mlp_only_layers", "names a layer twice");
    }
  }
}

void read_fields(JsonObject& json, const std::string& where, ModelConfig& c, Problems& problems) {
  Fields f(json);
  const auto type = json.text("model_type", true);
  if (type) c.model_type = *type;
  if (type && *type != "qwen2" && *type != "qwen2_moe") {
    json.refuse("model_type", fmt::format("found '{}', expected qwen2 or qwen2_moe", *type));
    return;  // the other keys mean something else there
  }
  f.integer("vocab_size", c.vocab_size, 1, kMaxVocab);
  f.integer("hidden_size", c.hidden_size, 1, kMaxWidth);
  f.integer("intermediate_size", c.intermediate_size, 1, kMaxWidth);
  f.integer("num_hidden_layers", c.num_hidden_layers, 1, kMaxLayers);
  f.integer("max_position_embeddings", c.max_position_embeddings, 1, kMaxPositions);
  f.number("rms_norm_eps", c.rms_norm_eps, true, false);
  f.number("initializer_range", c.initializer_range, false, true);
  f.truth("tie_word_embeddings", c.tie_word_embeddings, false);
  f.truth("qkv_bias", c.qkv_bias, false);
  read_heads(json, c);
  read_rope(json, where, c, problems);
  read_dtype(json, c);
  refuse_features(json, c);
  if (c.model_type == "qwen2_moe") read_experts(json, c);
}

}  // namespace

bool ModelConfig::is_moe_layer(int layer) const {
  return num_experts > 0 && (layer + 1) % decoder_sparse_step == 0 &&
         std::find(mlp_only_layers.begin(), mlp_only_layers.end(), layer) == mlp_only_layers.end();
}

int ModelConfig::num_moe_layers() const {
  int count = 0;
  for (int layer = 0; layer < num_hidden_layers; ++layer) count += is_moe_layer(layer) ? 1 : 0;
  return count;
}

ModelConfig parse_model_config(const std::string& json_text, const std::string& where) {
  ModelConfig config;
  Problems problems;
  JsonObject json(json_text, where, problems);
  if (problems.empty()) read_fields(json, where, config, problems);
  problems.throw_if_any(ExitCode::kBadInput, where);
  config.raw_json = json_text;
  return config;
}

ModelConfig read_model_config(const std::filesystem::path& path) {
  const bool directory = std::filesystem::is_directory(path);
  const std::filesystem::path file = directory ? path / "config.json" : path;
  std::string text;
  try {
    text = read_text_file(file);
  } catch (const Error& e) {
    throw Error(ExitCode::kBadInput, std::string(e.what()) +
                                         "; expected the config.json of a Hugging Face model" +
                                         model_folder_hint(path));
  }
  return parse_model_config(text, file.string());
}

}  // namespace upmoe
