#include "configs/families/gemma.h"

#include <fmt/format.h>

#include "configs/families/decoder.h"
#include "configs/families/features.h"
#include "configs/families/tensor_names.h"

namespace upmoe {
namespace {

constexpr const char* kKeys[] = {"hidden_activation"};
constexpr auto kTensors = together(kFrontTensors, kFfnTensors, kBackTensors);

void layers(ModelConfig& c) {
  c.qkv_bias = false;
  c.norm = NormKind::kRmsPlusOne;
  c.activation = Activation::kGeluTanh;
  c.scaled_embedding = true;
}

// The published files say "gelu", and were made with its tanh form; later ones have a second key for it, or null.
void require_gelu_tanh(JsonObject& json) {
  for (const char* key : {"hidden_act", "hidden_activation"}) {
    const auto act = json.text(key, false);
    if (act && *act != "gelu" && *act != "gelu_pytorch_tanh")
      json.refuse(key, fmt::format("found '{}', only gelu_pytorch_tanh is supported", *act));
  }
}

void read(JsonObject& json, ModelConfig& c) {
  layers(c);
  c.tie_word_embeddings = true;  // without the key
  read_decoder(json, c);
  require_head_dim(json, "256");
  require_gelu_tanh(json);
  require_full_attention(json);
  require_no_bias(json, "attention_bias");
  refuse_features(json, kGemma);
}

void write(const ModelConfig& c, JsonWriter& json) {
  write_decoder(c, json);
  json.set("head_dim", c.head_dim);
  json.set("hidden_activation", "gelu_pytorch_tanh");
}

}  // namespace

const Family kGemma{
    .model_type = "gemma",
    .architecture = "GemmaForCausalLM",
    .read = read,
    .write = write,
    .keys = kKeys,
    .tensors = kTensors,
    .layers = layers,
    .carries = Traits{Trait::kRmsNormPlusOne, Trait::kGeluTanh, Trait::kNoBiases, Trait::kNoQkNorm,
                      Trait::kScaledEmbedding, Trait::kTiedHead, Trait::kOwnHeadDim}};

}  // namespace upmoe
