#include "configs/families/llama.h"

#include "configs/families/decoder.h"
#include "configs/families/features.h"
#include "configs/families/tensor_names.h"

namespace upmoe {
namespace {

// The second splits products, and sums them again.
constexpr const char* kKeys[] = {"mlp_bias", "pretraining_tp"};
constexpr const char* kMixtures[] = {"mixtral", "deepseek"};
constexpr auto kTensors = together(kFrontTensors, kFfnTensors, kBackTensors);

void layers(ModelConfig& c) {
  c.qkv_bias = false;
}

void read(JsonObject& json, ModelConfig& c) {
  layers(c);
  read_decoder(json, c, {.rope_theta = 1e4, .kv_heads = true});  // Llama 2's and 1's config.json say neither
  require_silu(json);
  require_full_attention(json);
  require_no_bias(json, "attention_bias");
  require_no_bias(json, "mlp_bias");
  refuse_features(json, kLlama);
}

}  // namespace

const Family kLlama{.model_type = "llama",
                    .architecture = "LlamaForCausalLM",
                    .read = read,
                    .write = write_decoder,
                    .keys = kKeys,
                    .tensors = kTensors,
                    .layers = layers,
                    .carries = kPlainLayers | Traits{Trait::kNoBiases, Trait::kOwnHeadDim},
                    .mixtures = kMixtures};

}  // namespace upmoe
