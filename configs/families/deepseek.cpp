#include "configs/families/deepseek.h"

#include <fmt/format.h>

#include <algorithm>

#include "configs/families/decoder.h"
#include "configs/families/experts.h"
#include "configs/families/features.h"
#include "configs/families/tensor_names.h"

// DeepSeekMoE-16B (arXiv 2401.06066): Llama's layers, the first ones dense, the others with shared experts that have no
// gate and are one FFN as wide as they are together. transformers has no class of its own for it: the published
// directory brings its code along, which auto_map names.

namespace upmoe {
namespace {

constexpr const char* kKeys[] = {"n_routed_experts",
                                 "n_shared_experts",
                                 "num_experts_per_tok",
                                 "moe_intermediate_size",
                                 "norm_topk_prob",
                                 "first_k_dense_replace",
                                 "moe_layer_freq",
                                 "scoring_func",
                                 "aux_loss_alpha",
                                 "seq_aux",
                                 "auto_map"};
constexpr const char* kCode = "deepseek-ai/deepseek-moe-16b-base--";

constexpr auto kTensors =
    together(kFrontTensors, kExpertTensors, kFfnTensors, kSharedExpertsTensors, kBackTensors);

void read_experts(JsonObject& json, ModelConfig& c) {
  ConfigKeys f(json);
  read_num_experts(json, c, {"n_routed_experts"});
  f.integer("moe_intermediate_size", c.moe_intermediate_size, 1, kMaxWidth);
  read_shared_experts(json, c, false);
  f.truth("norm_topk_prob", c.norm_topk_prob, false);
  c.norm_topk_prob = c.norm_topk_prob && c.num_experts_per_tok > 1;  // a single expert keeps its probability
  f.number("aux_loss_alpha", c.router_aux_loss_coef, false, true);
  f.integer("first_k_dense_replace", c.first_k_dense_replace, 0, std::max(0, c.num_hidden_layers), false);
  const auto every = json.integer("moe_layer_freq", 1, kMaxLayers, false);
  if (every && *every != 1)
    json.refuse("moe_layer_freq",
                fmt::format("found {}; dense layers between mixtures are not supported", *every));
  const auto score = json.text("scoring_func", false);
  if (score && *score != "softmax")
    json.refuse("scoring_func", fmt::format("found '{}', only softmax is supported", *score));
}

void read(JsonObject& json, ModelConfig& c) {
  read_decoder(json, c);
  require_silu(json);
  require_full_attention(json);
  refuse_features(json, kDeepseek);
  for (const char* bias : {"attention_bias", "qkv_bias", "mlp_bias"}) require_no_bias(json, bias);
  if (c.head_dim * c.num_attention_heads != c.hidden_size)
    json.refuse("head_dim",
                fmt::format("found {}; heads of this family are hidden_size / heads wide", c.head_dim));
  c.qkv_bias = false;
  read_experts(json, c);
}

void write(const ModelConfig& c, JsonWriter& json) {
  write_decoder(c, json);
  json.set("n_routed_experts", c.num_experts);
  const std::int64_t shared = c.shared_expert_intermediate_size / c.moe_intermediate_size;
  if (shared > 0) json.set("n_shared_experts", shared);
  if (shared == 0) json.erase("n_shared_experts");  // none, where a 0 would make modules of width 0
  json.set("num_experts_per_tok", c.num_experts_per_tok);
  json.set("moe_intermediate_size", c.moe_intermediate_size);
  json.set("norm_topk_prob", c.norm_topk_prob);
  json.set("first_k_dense_replace", c.first_k_dense_replace);
  json.set("moe_layer_freq", 1);
  json.set("scoring_func", "softmax");
  json.set("aux_loss_alpha", c.router_aux_loss_coef);
  if (!json.has("seq_aux")) json.set("seq_aux", true);
  if (json.has("auto_map")) return;
  JsonWriter code;
  code.set("AutoConfig", fmt::format("{}configuration_deepseek.DeepseekConfig", kCode));
  code.set("AutoModel", fmt::format("{}modeling_deepseek.DeepseekModel", kCode));
  code.set("AutoModelForCausalLM", fmt::format("{}modeling_deepseek.DeepseekForCausalLM", kCode));
  json.set("auto_map", code);
}

}  // namespace

const Family kDeepseek{
    .model_type = "deepseek",
    .architecture = "DeepseekForCausalLM",
    .read = read,
    .write = write,
    .keys = kKeys,
    .tensors = kTensors,
    .carries =
        kPlainLayers | Traits{Trait::kNoBiases, Trait::kNoShared, Trait::kUngatedShared, Trait::kPlainWeights,
                              Trait::kRenormalised, Trait::kSoftmaxScores, Trait::kDenseFirst},
    .from_dense = put_dense_layers_in_front};

}  // namespace upmoe
