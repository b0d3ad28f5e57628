#include "configs/families/qwen2_moe.h"

#include <fmt/format.h>

#include <algorithm>

#include "configs/families/decoder.h"
#include "configs/families/features.h"
#include "configs/families/qwen2.h"
#include "configs/families/tensor_names.h"

namespace upmoe {
namespace {

constexpr const char* kKeys[] = {"num_experts",
                                 "num_local_experts",
                                 "num_experts_per_tok",
                                 "moe_intermediate_size",
                                 "shared_expert_intermediate_size",
                                 "norm_topk_prob",
                                 "decoder_sparse_step",
                                 "mlp_only_layers",
                                 "router_aux_loss_coef",
                                 "output_router_logits"};

constexpr auto kExpertTensors = std::to_array<TensorName>({
    {Role::kRouter, Half::kWhole, "model.layers.{0}.mlp.gate.weight"},
    {Role::kExpertGateUp, Half::kGate, "model.layers.{0}.mlp.experts.{1}.gate_proj.weight"},
    {Role::kExpertGateUp, Half::kUp, "model.layers.{0}.mlp.experts.{1}.up_proj.weight"},
    {Role::kExpertDown, Half::kWhole, "model.layers.{0}.mlp.experts.{1}.down_proj.weight"},
});
constexpr auto kSharedTensors = std::to_array<TensorName>({
    {Role::kSharedGateUp, Half::kGate, "model.layers.{0}.mlp.shared_expert.gate_proj.weight"},
    {Role::kSharedGateUp, Half::kUp, "model.layers.{0}.mlp.shared_expert.up_proj.weight"},
    {Role::kSharedDown, Half::kWhole, "model.layers.{0}.mlp.shared_expert.down_proj.weight"},
    {Role::kSharedGate, Half::kWhole, "model.layers.{0}.mlp.shared_expert_gate.weight"},
});
constexpr auto kTensors = together(kFrontTensors, kExpertTensors, kFfnTensors, kSharedTensors, kBackTensors);

void read_experts(JsonObject& json, ModelConfig& c) {
  ConfigKeys f(json);
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

void read(JsonObject& json, ModelConfig& c) {
  read_qwen2(json, c);
  if (json.truth("use_sliding_window", false).value_or(false)) refuse_window(json);
  require_full_attention(json);
  refuse_features(json, kQwen2Moe);
  read_experts(json, c);
  c.shared_expert_gate = true;
}

void write(const ModelConfig& c, JsonWriter& json) {
  write_qwen2(c, json);
  json.erase("num_local_experts");  // v5's second name of num_experts; two names could disagree
  json.set("num_experts", c.num_experts);
  json.set("num_experts_per_tok", c.num_experts_per_tok);
  json.set("moe_intermediate_size", c.moe_intermediate_size);
  json.set("shared_expert_intermediate_size", c.shared_expert_intermediate_size);
  json.set("norm_topk_prob", c.norm_topk_prob);
  json.set("decoder_sparse_step", c.decoder_sparse_step);
  json.set("mlp_only_layers", c.mlp_only_layers);
  json.set("router_aux_loss_coef", c.router_aux_loss_coef);
  if (!json.has("output_router_logits")) json.set("output_router_logits", false);
}

// No layer is dense any more; the published configuration gives the shared expert's width here.
void from_dense(ModelConfig& c) {
  c.shared_expert_gate = true;
  if (c.shared_expert_intermediate_size > 0) c.intermediate_size = c.shared_expert_intermediate_size;
}

}  // namespace

const Family kQwen2Moe{.model_type = "qwen2_moe",
                       .architecture = "Qwen2MoeForCausalLM",
                       .read = read,
                       .write = write,
                       .keys = kKeys,
                       .tensors = kTensors,
                       .empty_shared_expert = true,
                       .from_dense = from_dense};

}  // namespace upmoe
