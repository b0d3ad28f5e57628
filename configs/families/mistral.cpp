#include "configs/families/mistral.h"

#include "configs/families/decoder.h"
#include "configs/families/features.h"
#include "configs/families/tensor_names.h"

namespace upmoe {
namespace {

constexpr const char* kMixtures[] = {"mixtral", "deepseek"};
constexpr auto kTensors = together(kFrontTensors, kFfnTensors, kBackTensors);

void layers(ModelConfig& c) {
  c.qkv_bias = false;
}

// Null is attention over all that stands before a token. A file without the key means another number to each reader.
void read_window(JsonObject& json, ModelConfig& c) {
  if (json.is_null("sliding_window")) return;
  if (!json.has("sliding_window")) {
    json.refuse("sliding_window", "is missing; transformers takes 4096 then, and null for no window");
    return;
  }
  ConfigKeys(json).integer("sliding_window", c.sliding_window, 1, kMaxWindow);
}

void read(JsonObject& json, ModelConfig& c) {
  layers(c);
  read_decoder(json, c);
  read_window(json, c);
  require_silu(json);
  require_full_attention(json);
  refuse_features(json, kMistral);
}

void write(const ModelConfig& c, JsonWriter& json) {
  write_decoder(c, json);
  write_window(c, json);
}

}  // namespace

const Family kMistral{.model_type = "mistral",
                      .architecture = "MistralForCausalLM",
                      .read = read,
                      .write = write,
                      .keys = {},
                      .tensors = kTensors,
                      .layers = layers,
                      .carries = kPlainLayers | Traits{Trait::kNoBiases, Trait::kOwnHeadDim, Trait::kWindow},
                      .mixtures = kMixtures};

}  // namespace upmoe
