#include "configs/families/dots1.h"

#include <fmt/format.h>

#include <algorithm>

#include "configs/families/decoder.h"
#include "configs/families/experts.h"
#include "configs/families/features.h"
#include "configs/families/tensor_names.h"
#include "kernels/core/expert_groups.h"

// dots.llm1: Qwen3's attention (norms of q and k, no biases), the first layers dense, the others with DeepSeek-V3's
// routers (a sigmoid's scores, groups, a bias on the choice) and shared experts that have no gate and are one FFN.
// transformers keeps the bias in fp32, whatever the dtype of the weights.

namespace upmoe {
namespace {

constexpr const char* kKeys[] = {"n_routed_experts",
                                 "num_local_experts",
                                 "n_shared_experts",
                                 "num_experts_per_tok",
                                 "moe_intermediate_size",
                                 "norm_topk_prob",
                                 "first_k_dense_replace",
                                 "moe_layer_freq",
                                 "n_group",
                                 "topk_group",
                                 "routed_scaling_factor",
                                 "scoring_func",
                                 "topk_method",
                                 "output_router_logits"};
constexpr std::int64_t kDefaultWindowLayers = 62;  // transformers': max_window_layers where a file has none

constexpr auto kBiasTensors = std::to_array<TensorName>({
    {Role::kRouterBias, Half::kWhole, "model.layers.{0}.mlp.gate.e_score_correction_bias"},
});
constexpr auto kTensors = together(kFrontTensors, kHeadNormTensors, kFfnTensors, kRoutedTensors,
                                   kRouterTensors, kBiasTensors, kSharedExpertsTensors, kBackTensors);

// transformers leaves these aside; others compute by them, and they must say the same.
void require_text(JsonObject& json, const char* key, const char* expected) {
  const auto found = json.text(key, false);
  if (found && *found != expected)
    json.refuse(key, fmt::format("found '{}', this family's routers are '{}'", *found, expected));
}

// What transformers takes without a word is a window in every layer behind the 62nd.
void require_no_window(JsonObject& json, const ModelConfig& c) {
  if (json.has("layer_types")) return require_full_attention(json);
  if (json.is_null("sliding_window")) return;
  const std::int64_t first =
      json.integer("max_window_layers", 0, kMaxLayers, false).value_or(kDefaultWindowLayers);
  if (first < c.num_hidden_layers)
    json.refuse("sliding_window", fmt::format("the layers from {} on have a sliding window, "
                                              "which is not supported; null if they have none",
                                              first));
}

void read_groups(JsonObject& json, ModelConfig& c) {
  ConfigKeys f(json);
  f.integer("n_group", c.router.groups, 1, kMostExpertGroups, false);
  f.integer("topk_group", c.router.group_topk, 1, kMostExpertGroups, false);
  const int E = c.num_experts, groups = c.router.groups, chosen = c.router.group_topk;
  if (E == 0) return;  // has been refused
  if (E % groups != 0 || E < 2 * groups)
    return json.refuse("n_group", fmt::format("{} experts are not {} groups of two or more", E, groups));
  if (chosen > groups) return json.refuse("topk_group", fmt::format("{} of {} groups", chosen, groups));
  if (E / groups * chosen < c.num_experts_per_tok)
    json.refuse("topk_group", fmt::format("{} groups hold {} experts, and num_experts_per_tok is {}", chosen,
                                          E / groups * chosen, c.num_experts_per_tok));
}

void read_experts(JsonObject& json, ModelConfig& c) {
  ConfigKeys f(json);
  read_num_experts(json, c, {"n_routed_experts", "num_local_experts"});  // the second is transformers' alias
  f.integer("moe_intermediate_size", c.moe_intermediate_size, 1, kMaxWidth);
  read_shared_experts(json, c, true);
  f.truth("norm_topk_prob", c.norm_topk_prob, false);
  f.integer("first_k_dense_replace", c.first_k_dense_replace, 0, std::max(0, c.num_hidden_layers), false);
  const auto every = json.integer("moe_layer_freq", 1, kMaxLayers, false);
  if (every && *every != 1)
    json.refuse("moe_layer_freq",
                fmt::format("found {}; dense layers between mixtures are not supported", *every));
  read_groups(json, c);
  f.number("routed_scaling_factor", c.router.scale, false, false);
  require_text(json, "scoring_func", "sigmoid");
  require_text(json, "topk_method", "noaux_tc");
}

// Of all its models.
void give_routers(ModelConfig& c) {
  c.router.score = RouterScore::kSigmoid;
  c.router_bias = true;
}

void read(JsonObject& json, ModelConfig& c) {
  read_decoder(json, c);
  require_silu(json);
  require_no_window(json, c);
  refuse_features(json, kDots1);
  require_truth(json, "use_sliding_window", false, "sliding-window attention is not supported");
  for (const char* bias : {"attention_bias", "qkv_bias", "mlp_bias"}) require_no_bias(json, bias);
  c.qkv_bias = false;
  c.qk_norm = QkNorm::kPerHead;
  give_routers(c);
  read_experts(json, c);
}

void write(const ModelConfig& c, JsonWriter& json) {
  write_decoder(c, json);
  json.set("attention_bias", false);
  json.set_null("sliding_window");  // without the key there would be one
  json.erase("num_local_experts");
  json.set("n_routed_experts", c.num_experts);
  json.set("n_shared_experts", c.shared_expert_intermediate_size / c.moe_intermediate_size);
  json.set("num_experts_per_tok", c.num_experts_per_tok);
  json.set("moe_intermediate_size", c.moe_intermediate_size);
  json.set("norm_topk_prob", c.norm_topk_prob);
  json.set("first_k_dense_replace", c.first_k_dense_replace);
  json.set("n_group", c.router.groups);
  json.set("topk_group", c.router.group_topk);
  json.set("routed_scaling_factor", c.router.scale);
  // Not transformers' own; vLLM does not start without them.
  json.set("moe_layer_freq", 1);
  json.set("scoring_func", "sigmoid");
  json.set("topk_method", "noaux_tc");
  if (!json.has("output_router_logits")) json.set("output_router_logits", false);
}

void from_dense(ModelConfig& c) {
  give_routers(c);
  put_dense_layers_in_front(c);
}

}  // namespace

const Family kDots1{.model_type = "dots1",
                    .architecture = "Dots1ForCausalLM",
                    .read = read,
                    .write = write,
                    .keys = kKeys,
                    .tensors = kTensors,
                    .empty_shared_expert = true,
                    .carries = Traits{Trait::kRmsNorm, Trait::kSilu, Trait::kPlainEmbedding, Trait::kTiedHead,
                                      Trait::kNoBiases, Trait::kQkNorm, Trait::kOwnHeadDim, Trait::kNoShared,
                                      Trait::kUngatedShared, Trait::kPlainWeights, Trait::kRenormalised,
                                      Trait::kOneRenormalised, Trait::kScaledWeights, Trait::kSigmoidScores,
                                      Trait::kExpertGroups, Trait::kChoiceBias, Trait::kDenseFirst},
                    .from_dense = from_dense};

}  // namespace upmoe
