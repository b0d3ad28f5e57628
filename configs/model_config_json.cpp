// A model's config.json as transformers v4, v5 and vLLM read it.

#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "configs/model_config.h"
#include "kernels/core/check.h"

namespace upmoe {
namespace {

using nlohmann::ordered_json;

// Keys of the mixture, which a dense file must not carry along from the file it was made of.
constexpr const char* kMoeKeys[] = {"num_experts",
                                    "num_local_experts",
                                    "num_experts_per_tok",
                                    "moe_intermediate_size",
                                    "shared_expert_intermediate_size",
                                    "norm_topk_prob",
                                    "decoder_sparse_step",
                                    "mlp_only_layers",
                                    "router_aux_loss_coef",
                                    "output_router_logits"};

void set_experts(const ModelConfig& c, ordered_json& out) {
  out.erase("num_local_experts");  // v5's second name of num_experts; two names could disagree
  out["num_experts"] = c.num_experts;
  out["num_experts_per_tok"] = c.num_experts_per_tok;
  out["moe_intermediate_size"] = c.moe_intermediate_size;
  out["shared_expert_intermediate_size"] = c.shared_expert_intermediate_size;
  out["norm_topk_prob"] = c.norm_topk_prob;
  out["decoder_sparse_step"] = c.decoder_sparse_step;
  out["mlp_only_layers"] = c.mlp_only_layers;
  out["router_aux_loss_coef"] = c.router_aux_loss_coef;
  if (!out.contains("output_router_logits")) out["output_router_logits"] = false;
}

// Both forms: a reader that knows only one of them would fall back to another base without a word.
void set_rope(const ModelConfig& c, ordered_json& out) {
  out["rope_theta"] = c.rope_theta;
  out["rope_parameters"] = {{"rope_type", "default"}, {"rope_theta", c.rope_theta}};
  out.erase("rope_scaling");
}

void set_attention(const ModelConfig& c, ordered_json& out) {
  out["num_attention_heads"] = c.num_attention_heads;
  out["num_key_value_heads"] = c.num_key_value_heads;
  const bool implied = c.num_attention_heads > 0 && c.head_dim * c.num_attention_heads == c.hidden_size;
  if (!implied || out.contains("head_dim")) out["head_dim"] = c.head_dim;
  if (!c.qkv_bias || out.contains("qkv_bias")) out["qkv_bias"] = c.qkv_bias;
  out["use_sliding_window"] = false;
  if (!out.contains("attention_dropout")) out["attention_dropout"] = 0.0;
  // One entry per layer: of use only while the number of layers is the one it was written for.
  const auto types = out.find("layer_types");
  if (types != out.end() && types->size() != static_cast<std::size_t>(c.num_hidden_layers))
    out.erase("layer_types");
}

}  // namespace

std::string to_hf_json(const ModelConfig& config) {
  ordered_json out = ordered_json::parse(config.raw_json, nullptr, false);
  if (!out.is_object()) fail(ExitCode::kFailure, "raw_json of a model config is not a JSON object");
  const bool moe = config.model_type == "qwen2_moe";
  out["architectures"] = {moe ? "Qwen2MoeForCausalLM" : "Qwen2ForCausalLM"};
  out["model_type"] = config.model_type;
  out["hidden_act"] = "silu";
  out["vocab_size"] = config.vocab_size;
  out["hidden_size"] = config.hidden_size;
  out["intermediate_size"] = config.intermediate_size;
  out["num_hidden_layers"] = config.num_hidden_layers;
  out["max_position_embeddings"] = config.max_position_embeddings;
  out["rms_norm_eps"] = config.rms_norm_eps;
  out["initializer_range"] = config.initializer_range;
  out["tie_word_embeddings"] = config.tie_word_embeddings;
  if (!out.contains("use_cache")) out["use_cache"] = true;
  out.erase("transformers_weights");  // of the directory that it was read from
  set_attention(config, out);
  set_rope(config, out);
  out["torch_dtype"] = config.dtype;
  out["dtype"] = config.dtype;
  if (moe) {
    set_experts(config, out);
  } else {
    for (const char* key : kMoeKeys) out.erase(key);
  }
  return out.dump(2) + "\n";
}

}  // namespace upmoe
