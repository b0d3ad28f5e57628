#include "configs/families/decoder.h"

#include <fmt/format.h>

#include <optional>
#include <string_view>

namespace upmoe {
namespace {

// The base of one rope description; anything that would change the angles is refused.
std::optional<double> base_of(JsonObject& rope) {
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

}  // namespace

void ConfigKeys::number(const std::string& key, double& target, bool required, bool may_be_zero) {
  const auto v = json_.number(key, required);
  if (!v) return;
  if (*v < 0 || (*v == 0 && !may_be_zero)) {
    json_.refuse(key, fmt::format("found {}, expected {}", *v, may_be_zero ? "at least 0" : "more than 0"));
    return;
  }
  target = *v;
}

void read_sizes(JsonObject& json, ModelConfig& c) {
  ConfigKeys f(json);
  f.integer("vocab_size", c.vocab_size, 1, kMaxVocab);
  f.integer("hidden_size", c.hidden_size, 1, kMaxWidth);
  f.integer("intermediate_size", c.intermediate_size, 1, kMaxWidth);
  f.integer("num_hidden_layers", c.num_hidden_layers, 1, kMaxLayers);
  f.integer("max_position_embeddings", c.max_position_embeddings, 1, kMaxPositions);
  f.number("rms_norm_eps", c.rms_norm_eps, true, false);
  f.number("initializer_range", c.initializer_range, false, true);
  f.truth("tie_word_embeddings", c.tie_word_embeddings, false);
}

void read_heads(JsonObject& json, ModelConfig& c, const LeftOut& left_out) {
  ConfigKeys f(json);
  f.integer("num_attention_heads", c.num_attention_heads, 1, kMaxHeads);
  if (json.is_null("num_key_value_heads") || (left_out.kv_heads && !json.has("num_key_value_heads"))) {
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

// The form of transformers v4 (rope_theta beside rope_scaling) and that of v5 (rope_parameters) say the same
// thing, or the file is wrong: each version would take another one of two values.
void read_rope(JsonObject& json, ModelConfig& c, const LeftOut& left_out) {
  std::optional<double> theta = json.number("rope_theta", false);
  std::string found_in = "rope_theta";
  for (const char* key : {"rope_parameters", "rope_scaling"}) {
    const std::unique_ptr<JsonObject> rope = json.object(key);
    if (rope == nullptr) continue;
    const auto nested = base_of(*rope);
    if (theta && nested && *theta != *nested) {
      json.refuse(found_in,
                  fmt::format("found {}, but {}.rope_theta is {}; they must agree", *theta, key, *nested));
    }
    if (theta || !nested) continue;
    theta = nested;
    found_in = fmt::format("{}.rope_theta", key);
  }
  if (!theta) theta = left_out.rope_theta;
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
  if (!v4 && !v5) return;
  const std::string& found = v5 ? *v5 : *v4;
  if (const auto dtype = value_named<FileDType>(found)) {
    c.dtype = *dtype;
  } else {
    json.refuse("dtype", fmt::format("found '{}', expected {}", found,
                                     fmt::join(name_list<FileDType>().built, " or ")));
  }
}

void read_decoder(JsonObject& json, ModelConfig& c, const LeftOut& left_out) {
  read_sizes(json, c);
  read_heads(json, c, left_out);
  read_rope(json, c, left_out);
  read_dtype(json, c);
}

void require_head_dim(JsonObject& json, const char* otherwise) {
  if (!json.has("head_dim"))
    json.refuse("head_dim", fmt::format("is missing; transformers takes {} then", otherwise));
}

void require_no_bias(JsonObject& json, const char* key) {
  if (json.truth(key, false).value_or(false)) json.refuse(key, "found true; these biases are not supported");
}

void require_silu(JsonObject& json) {
  const auto act = json.text("hidden_act", true);
  if (act && *act != "silu" && *act != "swish")  // two names of one function
    json.refuse("hidden_act", fmt::format("found '{}', only silu is supported", *act));
}

void require_full_attention(JsonObject& json) {
  for (const std::string& type : json.texts("layer_types", false).value_or(std::vector<std::string>{})) {
    if (type == "full_attention") continue;
    json.refuse("layer_types", fmt::format("found {}, only full_attention is supported", type));
    return;
  }
}

void write_decoder(const ModelConfig& c, JsonWriter& json) {
  write_sizes(c, json);
  write_heads(c, json);
  write_attention(c, json);
  write_rope(c, json);
  write_dtype(c, json);
}

void write_window(const ModelConfig& c, JsonWriter& json) {
  if (c.sliding_window > 0) {
    json.set("sliding_window", c.sliding_window);
  } else {
    json.set_null("sliding_window");
  }
}

void write_sizes(const ModelConfig& c, JsonWriter& json) {
  json.set("hidden_act", c.activation == Activation::kGeluTanh ? "gelu_pytorch_tanh" : "silu");
  json.set("vocab_size", c.vocab_size);
  json.set("hidden_size", c.hidden_size);
  json.set("intermediate_size", c.intermediate_size);
  json.set("num_hidden_layers", c.num_hidden_layers);
  json.set("max_position_embeddings", c.max_position_embeddings);
  json.set("rms_norm_eps", c.rms_norm_eps);
  json.set("initializer_range", c.initializer_range);
  json.set("tie_word_embeddings", c.tie_word_embeddings);
  if (!json.has("use_cache")) json.set("use_cache", true);
  json.erase("transformers_weights");  // of the directory that it was read from
}

void write_heads(const ModelConfig& c, JsonWriter& json) {
  json.set("num_attention_heads", c.num_attention_heads);
  json.set("num_key_value_heads", c.num_key_value_heads);
  const bool implied = c.num_attention_heads > 0 && c.head_dim * c.num_attention_heads == c.hidden_size;
  if (!implied || json.has("head_dim")) json.set("head_dim", c.head_dim);
}

void write_attention(const ModelConfig& c, JsonWriter& json) {
  if (!json.has("attention_dropout")) json.set("attention_dropout", 0.0);
  // One entry per layer: of use only while the number of layers is the one it was written for.
  if (json.length("layer_types") != static_cast<std::size_t>(c.num_hidden_layers)) json.erase("layer_types");
}

// Both forms: a reader that knows only one of them would fall back to another base without a word.
void write_rope(const ModelConfig& c, JsonWriter& json) {
  json.set("rope_theta", c.rope_theta);
  JsonWriter rope;
  rope.set("rope_type", "default");
  rope.set("rope_theta", c.rope_theta);
  json.set("rope_parameters", rope);
  json.erase("rope_scaling");
}

void write_dtype(const ModelConfig& c, JsonWriter& json) {
  json.set("torch_dtype", name_of(c.dtype));
  json.set("dtype", name_of(c.dtype));
}

}  // namespace upmoe
