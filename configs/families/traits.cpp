#include "configs/families/traits.h"

#include <fmt/format.h>

#include <vector>

namespace upmoe {
namespace {

Trait trait_of(NormKind norm) {
  switch (norm) {
    case NormKind::kRms:
      return Trait::kRmsNorm;
    case NormKind::kRmsPlusOne:
      return Trait::kRmsNormPlusOne;
    case NormKind::kLayerNorm:
      return Trait::kLayerNorm;
  }
  fail(ExitCode::kFailure, "no such norm");
}

Traits only_if(bool has, Trait trait) {
  return has ? Traits{trait} : Traits{};
}

Traits traits_of_layers(const ModelConfig& c) {
  return Traits{trait_of(c.norm), c.activation == Activation::kSilu ? Trait::kSilu : Trait::kGeluTanh,
                c.qkv_bias ? Trait::kBiases : Trait::kNoBiases,
                c.qk_norm == QkNorm::kNone ? Trait::kNoQkNorm : Trait::kQkNorm,
                c.scaled_embedding ? Trait::kScaledEmbedding : Trait::kPlainEmbedding} |
         only_if(c.clip_qkv != 0, Trait::kClippedQkv) | only_if(c.sliding_window != 0, Trait::kWindow) |
         only_if(c.head_dim * c.num_attention_heads != c.hidden_size, Trait::kOwnHeadDim) |
         only_if(c.tie_word_embeddings, Trait::kTiedHead);
}

Traits traits_of_shared_expert(const ModelConfig& c) {
  if (c.shared_expert_intermediate_size == 0) return {Trait::kNoShared};
  const Traits gate{c.shared_expert_gate ? Trait::kGatedShared : Trait::kUngatedShared};
  const bool whole =
      c.moe_intermediate_size > 0 && c.shared_expert_intermediate_size % c.moe_intermediate_size == 0;
  return whole ? gate : gate | Traits{Trait::kSharedBetween};
}

Traits traits_of_weights(const ModelConfig& c) {
  return Traits{c.norm_topk_prob ? Trait::kRenormalised : Trait::kPlainWeights} |
         only_if(c.norm_topk_prob && c.num_experts_per_tok == 1, Trait::kOneRenormalised);
}

Traits traits_of_router(const ModelConfig& c) {
  return Traits{c.router.score == RouterScore::kSigmoid ? Trait::kSigmoidScores : Trait::kSoftmaxScores} |
         only_if(c.router.scale != 1, Trait::kScaledWeights) |
         only_if(c.router.groups != 1 || c.router.group_topk != 1, Trait::kExpertGroups) |
         only_if(c.router_bias, Trait::kChoiceBias);
}

// Dense layers in front: as many as there are up to the first mixture. Any other one lies between or behind.
Traits traits_of_kept_layers(const ModelConfig& c) {
  int first = 0;
  while (first < c.num_hidden_layers && !c.is_moe_layer(first)) ++first;
  return only_if(first > 0, Trait::kDenseFirst) |
         only_if(first + c.num_moe_layers() < c.num_hidden_layers, Trait::kDenseBetween);
}

}  // namespace

Traits traits_of(const ModelConfig& c) {
  const Traits layers = traits_of_layers(c);
  if (c.num_experts == 0) return layers;
  return layers | traits_of_shared_expert(c) | traits_of_weights(c) | traits_of_router(c) |
         traits_of_kept_layers(c);
}

std::string Traits::words() const {
  std::vector<const char*> words;
  for (const Named<Trait>& entry : kNames<Trait>.built)
    if (has(entry.value)) words.push_back(entry.name);
  return fmt::format("{}", fmt::join(words, "; "));
}

}  // namespace upmoe
