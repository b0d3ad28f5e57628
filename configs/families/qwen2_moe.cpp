#include "configs/families/qwen2_moe.h"

#include "configs/families/decoder.h"
#include "configs/families/experts.h"
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

constexpr auto kSharedTensors = std::to_array<TensorName>({
    {Role::kSharedGateUp, Half::kGate, "model.layers.{0}.mlp.shared_expert.gate_proj.weight"},
    {Role::kSharedGateUp, Half::kUp, "model.layers.{0}.mlp.shared_expert.up_proj.weight"},
    {Role::kSharedDown, Half::kWhole, "model.layers.{0}.mlp.shared_expert.down_proj.weight"},
    {Role::kSharedGate, Half::kWhole, "model.layers.{0}.mlp.shared_expert_gate.weight"},
});
constexpr auto kTensors = together(kFrontTensors, kExpertTensors, kFfnTensors, kSharedTensors, kBackTensors);

void read_experts(JsonObject& json, ModelConfig& c) {
  ConfigKeys f(json);
  read_num_experts(json, c, {"num_experts", "num_local_experts"});  // the second is v5's
  f.integer("moe_intermediate_size", c.moe_intermediate_size, 1, kMaxWidth);
  f.integer("shared_expert_intermediate_size", c.shared_expert_intermediate_size, 0, kMaxWidth);
  f.truth("norm_topk_prob", c.norm_topk_prob, true);
  f.number("router_aux_loss_coef", c.router_aux_loss_coef, false, true);
  read_kept_layers(json, c);
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
  write_kept_layers(c, json);
  write_balance(c, json);
}

// Where no layer is dense any more, the published configuration gives the shared expert's width here.
void from_dense(ModelConfig& c) {
  const bool all = c.num_moe_layers() == c.num_hidden_layers;
  if (all && c.shared_expert_intermediate_size > 0) c.intermediate_size = c.shared_expert_intermediate_size;
}

}  // namespace

const Family kQwen2Moe{
    .model_type = "qwen2_moe",
    .architecture = "Qwen2MoeForCausalLM",
    .read = read,
    .write = write,
    .keys = kKeys,
    .tensors = kTensors,
    .empty_shared_expert = true,
    .carries = kQwen2Layers | Traits{Trait::kNoShared, Trait::kGatedShared, Trait::kSharedBetween,
                                     Trait::kPlainWeights, Trait::kRenormalised, Trait::kOneRenormalised,
                                     Trait::kSoftmaxScores, Trait::kDenseFirst, Trait::kDenseBetween},
    .from_dense = from_dense};

}  // namespace upmoe
