#include "configs/families/qwen3.h"

#include "configs/families/decoder.h"
#include "configs/families/features.h"
#include "configs/families/qwen2.h"
#include "configs/families/tensor_names.h"

namespace upmoe {
namespace {

constexpr const char* kMixtures[] = {"qwen3_moe", "dots1"};
constexpr auto kTensors = together(kFrontTensors, kHeadNormTensors, kFfnTensors, kBackTensors);

void layers(ModelConfig& c) {
  c.qkv_bias = false;
  c.qk_norm = QkNorm::kPerHead;
}

void read(JsonObject& json, ModelConfig& c) {
  layers(c);
  read_decoder(json, c);
  require_head_dim(json, "128");
  require_silu(json);
  require_no_bias(json, "attention_bias");
  if (window_reaches_a_layer(json, c)) refuse_window(json);
  require_full_attention(json);
  refuse_features(json, kQwen3);
}

void write(const ModelConfig& c, JsonWriter& json) {
  write_decoder(c, json);
  json.set("head_dim", c.head_dim);
  json.set("use_sliding_window", false);
}

}  // namespace

const Family kQwen3{.model_type = "qwen3",
                    .architecture = "Qwen3ForCausalLM",
                    .read = read,
                    .write = write,
                    .keys = {},
                    .tensors = kTensors,
                    .layers = layers,
                    .carries = Traits{Trait::kRmsNorm, Trait::kSilu, Trait::kPlainEmbedding, Trait::kTiedHead,
                                      Trait::kNoBiases, Trait::kQkNorm, Trait::kOwnHeadDim},
                    .mixtures = kMixtures};

}  // namespace upmoe
