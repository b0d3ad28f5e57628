#include "configs/families/features.h"

#include <fmt/format.h>

#include <algorithm>
#include <initializer_list>
#include <string_view>

namespace upmoe {
namespace {

// A key and the values (as JSON) with which it changes nothing. Most belong to other architectures: transformers
// leaves them aside under our model types, but a file that gives them was made for code that does not.
struct Feature {
  const char* key;
  std::initializer_list<std::string_view> neutral;
  const char* what;
};

const Feature kFeatures[] = {
    {"attention_dropout", {"0", "0.0"}, "dropout is not supported"},
    {"quantization_config", {}, "quantised weights are not supported; use the original model"},
    {"compression_config", {}, "compressed weights are not supported; use the original model"},
    {"is_causal", {"true"}, "attention in both directions is not supported"},
    {"use_bidirectional_attention", {"false"}, "attention in both directions is not supported"},
    {"is_encoder_decoder", {"false"}, "encoders are not supported"},
    {"add_cross_attention", {"false"}, "cross-attention is not supported"},
    {"partial_rotary_factor", {"1", "1.0"}, "rotary positions on a part of a head are not supported"},
    {"rotary_pct", {"1", "1.0"}, "rotary positions on a part of a head are not supported"},
    {"rope_local_base_freq", {}, "a second rotary base is not supported"},
    {"use_dynamic_ntk", {"false"}, "position scaling is not supported"},
    {"use_logn_attn", {"false"}, "scaling of attention by length is not supported"},
    {"alibi", {"false"}, "ALiBi is not supported"},
    {"use_alibi", {"false"}, "ALiBi is not supported"},
    {"attn_logit_softcapping", {}, "soft caps are not supported"},
    {"final_logit_softcapping", {}, "soft caps are not supported"},
    {"clip_qkv", {}, "clipping of q, k, v is not supported"},
    {"use_qk_norm", {"false"}, "norms of q and k are not supported"},
    {"qk_norm", {"false"}, "norms of q and k are not supported"},
    {"qk_layernorm", {"false"}, "norms of q and k are not supported"},
    {"query_pre_attn_scalar", {}, "another scale of attention is not supported"},
    {"attention_multiplier", {}, "another scale of attention is not supported"},
    {"embedding_multiplier", {"1", "1.0"}, "scaled embeddings are not supported"},
    {"scale_emb", {"1", "1.0"}, "scaled embeddings are not supported"},
    {"residual_multiplier", {"1", "1.0"}, "scaled residuals are not supported"},
    {"logit_scale", {"1", "1.0"}, "scaled logits are not supported"},
    {"logits_scaling", {"1", "1.0"}, "scaled logits are not supported"},
    {"parallel_attn", {"false"}, "attention beside the FFN is not supported"},
    {"use_parallel_residual", {"false"}, "attention beside the FFN is not supported"},
    {"pruned_heads", {"{}"}, "pruned heads are not supported"},
    {"scoring_func", {"\"softmax\""}, "only the softmax router is supported"},
    {"topk_method", {"\"greedy\""}, "only plain top-k is supported"},
    {"routed_scaling_factor", {"1", "1.0"}, "scaled routed experts are not supported"},
    {"n_group", {"0", "1"}, "groups of experts are not supported"},
    {"topk_group", {"0", "1"}, "groups of experts are not supported"},
    {"n_shared_experts", {"0"}, "several shared experts are not supported"},
    {"first_k_dense_replace", {"0"}, "not known here; name the dense layers in mlp_only_layers"},
    {"moe_layer_freq", {"1"}, "not known here; give decoder_sparse_step"},
};

}  // namespace

void refuse_features(JsonObject& json, const Family& family) {
  for (const Feature& f : kFeatures) {
    const bool known =
        std::find(family.keys.begin(), family.keys.end(), std::string_view(f.key)) != family.keys.end();
    const std::string value = json.as_text(f.key);
    if (known || value.empty() || std::find(f.neutral.begin(), f.neutral.end(), value) != f.neutral.end())
      continue;
    json.refuse(f.key, fmt::format("found {}; {}", value, f.what));
  }
  const auto weights = json.text("transformers_weights", false);
  if (weights && *weights != "model.safetensors")
    json.refuse("transformers_weights",
                fmt::format("names the file {}; rename it model.safetensors and remove this key", *weights));
}

}  // namespace upmoe
