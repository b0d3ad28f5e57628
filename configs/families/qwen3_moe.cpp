#include "configs/families/qwen3_moe.h"

#include "configs/families/decoder.h"
#include "configs/families/experts.h"
#include "configs/families/features.h"
#include "configs/families/tensor_names.h"

// Qwen3's attention (norms of q and k, no biases) with experts of which none is shared; layers may stay dense.

namespace upmoe {
namespace {

constexpr const char* kKeys[] = {"num_experts",           "num_local_experts",    "num_experts_per_tok",
                                 "moe_intermediate_size", "norm_topk_prob",       "decoder_sparse_step",
                                 "mlp_only_layers",       "router_aux_loss_coef", "output_router_logits"};

constexpr auto kTensors =
    together(kFrontTensors, kHeadNormTensors, kExpertTensors, kFfnTensors, kBackTensors);

void read(JsonObject& json, ModelConfig& c) {
  read_decoder(json, c);
  require_silu(json);
  require_full_attention(json);
  refuse_features(json, kQwen3Moe);
  require_truth(json, "use_sliding_window", false, "sliding-window attention is not supported");
  for (const char* bias : {"attention_bias", "qkv_bias", "mlp_bias"}) require_no_bias(json, bias);
  if (json.integer("shared_expert_intermediate_size", 0, kMaxWidth, false).value_or(0) > 0)
    json.refuse("shared_expert_intermediate_size", "this family has no shared expert");
  c.qkv_bias = false;
  c.qk_norm = QkNorm::kPerHead;
  c.shared_expert_gate = false;
  read_num_experts(json, c, {"num_experts", "num_local_experts"});  // the second is v5's
  ConfigKeys f(json);
  f.integer("moe_intermediate_size", c.moe_intermediate_size, 1, kMaxWidth);
  f.truth("norm_topk_prob", c.norm_topk_prob, true);
  f.number("router_aux_loss_coef", c.router_aux_loss_coef, false, true);
  read_kept_layers(json, c);
}

void write(const ModelConfig& c, JsonWriter& json) {
  write_decoder(c, json);
  json.set("head_dim", c.head_dim);
  json.set("attention_bias", false);
  json.set("use_sliding_window", false);
  json.erase("num_local_experts");  // v5's second name of num_experts; two names could disagree
  json.set("num_experts", c.num_experts);
  json.set("num_experts_per_tok", c.num_experts_per_tok);
  json.set("moe_intermediate_size", c.moe_intermediate_size);
  json.set("norm_topk_prob", c.norm_topk_prob);
  write_kept_layers(c, json);
  write_balance(c, json);
}

}  // namespace

const Family kQwen3Moe{
    .model_type = "qwen3_moe",
    .architecture = "Qwen3MoeForCausalLM",
    .read = read,
    .write = write,
    .keys = kKeys,
    .tensors = kTensors,
    .carries = Traits{Trait::kRmsNorm, Trait::kSilu, Trait::kPlainEmbedding, Trait::kTiedHead,
                      Trait::kNoBiases, Trait::kQkNorm, Trait::kOwnHeadDim, Trait::kNoShared,
                      Trait::kPlainWeights, Trait::kRenormalised, Trait::kOneRenormalised,
                      Trait::kSoftmaxScores, Trait::kDenseFirst, Trait::kDenseBetween}};

}  // namespace upmoe
