#include "configs/families/mixtral.h"

#include "configs/families/decoder.h"
#include "configs/families/experts.h"
#include "configs/families/features.h"
#include "configs/families/tensor_names.h"

// Every layer is a mixture; intermediate_size is the width of one expert, and the weights of the chosen experts always
// add up to one. On disk the experts have the names of the first release (w1 gate, w3 up, w2 down), as transformers
// still writes them whatever its modules are called in memory.

namespace upmoe {
namespace {

constexpr const char* kKeys[] = {"num_local_experts", "num_experts_per_tok", "router_aux_loss_coef",
                                 "output_router_logits", "router_jitter_noise"};

constexpr auto kOwnExpertTensors = std::to_array<TensorName>({
    {Role::kRouter, Half::kWhole, "model.layers.{0}.block_sparse_moe.gate.weight"},
    {Role::kExpertGateUp, Half::kGate, "model.layers.{0}.block_sparse_moe.experts.{1}.w1.weight"},
    {Role::kExpertDown, Half::kWhole, "model.layers.{0}.block_sparse_moe.experts.{1}.w2.weight"},
    {Role::kExpertGateUp, Half::kUp, "model.layers.{0}.block_sparse_moe.experts.{1}.w3.weight"},
});
constexpr auto kTensors = together(kFrontTensors, kOwnExpertTensors, kBackTensors);

void read(JsonObject& json, ModelConfig& c) {
  read_decoder(json, c);
  require_silu(json);
  require_full_attention(json);
  if (json.has("sliding_window")) ConfigKeys(json).integer("sliding_window", c.sliding_window, 1, kMaxWindow);
  refuse_features(json, kMixtral);
  for (const char* bias : {"attention_bias", "qkv_bias", "mlp_bias"}) require_no_bias(json, bias);
  require_truth(json, "norm_topk_prob", true, "this family always renormalises the chosen experts' weights");
  const auto jitter = json.number("router_jitter_noise", false);
  if (jitter && *jitter != 0)
    json.refuse("router_jitter_noise", "noise before the router is not supported; use 0");
  c.qkv_bias = false;
  read_num_experts(json, c, {"num_local_experts", "num_experts"});
  ConfigKeys(json).number("router_aux_loss_coef", c.router_aux_loss_coef, false, true);
  c.moe_intermediate_size = c.intermediate_size;
  c.shared_expert_gate = false;
  c.norm_topk_prob = true;
}

void write(const ModelConfig& c, JsonWriter& json) {
  write_decoder(c, json);
  json.set("intermediate_size", c.moe_intermediate_size);
  write_window(c, json);
  json.set("num_local_experts", c.num_experts);
  json.set("num_experts_per_tok", c.num_experts_per_tok);
  write_balance(c, json);
}

void from_dense(ModelConfig& c) {
  c.intermediate_size = c.moe_intermediate_size;
}

}  // namespace

const Family kMixtral{
    .model_type = "mixtral",
    .architecture = "MixtralForCausalLM",
    .read = read,
    .write = write,
    .keys = kKeys,
    .tensors = kTensors,
    .carries = kPlainLayers | Traits{Trait::kNoBiases, Trait::kOwnHeadDim, Trait::kWindow, Trait::kNoShared,
                                     Trait::kRenormalised, Trait::kOneRenormalised, Trait::kSoftmaxScores},
    .from_dense = from_dense};

}  // namespace upmoe
