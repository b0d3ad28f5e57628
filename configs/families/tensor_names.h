#pragma once
// Names of tensors that most decoders share, in transformers' order, and how a family puts its own between them.
// A row for what a model lacks (biases, say) is passed over.

#include <algorithm>
#include <array>

#include "configs/families/family.h"

namespace upmoe {

inline constexpr auto kFrontTensors = std::to_array<TensorName>({
    {Role::kEmbedding, Half::kWhole, "model.embed_tokens.weight"},
    {Role::kQuery, Half::kWhole, "model.layers.{0}.self_attn.q_proj.weight"},
    {Role::kQueryBias, Half::kWhole, "model.layers.{0}.self_attn.q_proj.bias"},
    {Role::kKey, Half::kWhole, "model.layers.{0}.self_attn.k_proj.weight"},
    {Role::kKeyBias, Half::kWhole, "model.layers.{0}.self_attn.k_proj.bias"},
    {Role::kValue, Half::kWhole, "model.layers.{0}.self_attn.v_proj.weight"},
    {Role::kValueBias, Half::kWhole, "model.layers.{0}.self_attn.v_proj.bias"},
    {Role::kAttentionOutput, Half::kWhole, "model.layers.{0}.self_attn.o_proj.weight"},
});
inline constexpr auto kHeadNormTensors = std::to_array<TensorName>({
    {Role::kQueryNorm, Half::kWhole, "model.layers.{0}.self_attn.q_norm.weight"},
    {Role::kKeyNorm, Half::kWhole, "model.layers.{0}.self_attn.k_norm.weight"},
});
inline constexpr auto kFfnTensors = std::to_array<TensorName>({
    {Role::kFfnGateUp, Half::kGate, "model.layers.{0}.mlp.gate_proj.weight"},
    {Role::kFfnGateUp, Half::kUp, "model.layers.{0}.mlp.up_proj.weight"},
    {Role::kFfnDown, Half::kWhole, "model.layers.{0}.mlp.down_proj.weight"},
});
inline constexpr auto kRouterTensors = std::to_array<TensorName>({
    {Role::kRouter, Half::kWhole, "model.layers.{0}.mlp.gate.weight"},
});
inline constexpr auto kRoutedTensors = std::to_array<TensorName>({
    {Role::kExpertGateUp, Half::kGate, "model.layers.{0}.mlp.experts.{1}.gate_proj.weight"},
    {Role::kExpertGateUp, Half::kUp, "model.layers.{0}.mlp.experts.{1}.up_proj.weight"},
    {Role::kExpertDown, Half::kWhole, "model.layers.{0}.mlp.experts.{1}.down_proj.weight"},
});
// Several shared experts, one FFN.
inline constexpr auto kSharedExpertsTensors = std::to_array<TensorName>({
    {Role::kSharedGateUp, Half::kGate, "model.layers.{0}.mlp.shared_experts.gate_proj.weight"},
    {Role::kSharedGateUp, Half::kUp, "model.layers.{0}.mlp.shared_experts.up_proj.weight"},
    {Role::kSharedDown, Half::kWhole, "model.layers.{0}.mlp.shared_experts.down_proj.weight"},
});
inline constexpr auto kBackTensors = std::to_array<TensorName>({
    {Role::kNorm1, Half::kWhole, "model.layers.{0}.input_layernorm.weight"},
    {Role::kNorm2, Half::kWhole, "model.layers.{0}.post_attention_layernorm.weight"},
    {Role::kFinalNorm, Half::kWhole, "model.norm.weight"},
    {Role::kHead, Half::kWhole, "lm_head.weight"},
});

template <std::size_t... N>
constexpr auto together(const std::array<TensorName, N>&... parts) {
  std::array<TensorName, (N + ...)> all{};
  auto at = all.begin();
  ((at = std::copy(parts.begin(), parts.end(), at)), ...);
  return all;
}

inline constexpr auto kExpertTensors = together(kRouterTensors, kRoutedTensors);

}  // namespace upmoe
