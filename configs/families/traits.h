#pragma once
// In what models differ that one family can say in its config.json and tensors, and another cannot. A family lists the
// traits that it carries (Family::carries); what a model has and a family does not list keeps the one from being
// written as the other, in the words of this table.

#include <cstdint>
#include <initializer_list>
#include <string>

#include "configs/model_config.h"
#include "configs/names.h"

namespace upmoe {

enum class Trait : std::uint8_t {
  kRmsNorm,
  kRmsNormPlusOne,
  kLayerNorm,
  kSilu,
  kGeluTanh,
  kBiases,
  kNoBiases,
  kQkNorm,
  kNoQkNorm,
  kClippedQkv,
  kWindow,
  kOwnHeadDim,
  kScaledEmbedding,
  kPlainEmbedding,
  kTiedHead,
  // Of mixtures
  kNoShared,
  kGatedShared,
  kUngatedShared,
  kSharedBetween,
  kPlainWeights,
  kRenormalised,
  kOneRenormalised,
  kScaledWeights,
  kSoftmaxScores,
  kSigmoidScores,
  kExpertGroups,
  kChoiceBias,
  kDenseFirst,
  kDenseBetween
};
template <>
inline constexpr Names<Trait> kNames<Trait>{
    .built = {{Trait::kRmsNorm, "RMS norms"},
              {Trait::kRmsNormPlusOne, "RMS norms of 1 + weight"},
              {Trait::kLayerNorm, "LayerNorms"},
              {Trait::kSilu, "a gate of silu"},
              {Trait::kGeluTanh, "a gate of gelu"},
              {Trait::kBiases, "biases of q, k and v"},
              {Trait::kNoBiases, "q, k and v without biases"},
              {Trait::kQkNorm, "norms of q and k"},
              {Trait::kNoQkNorm, "q and k without norms"},
              {Trait::kClippedQkv, "clipped q, k and v"},
              {Trait::kWindow, "a sliding window"},
              {Trait::kOwnHeadDim, "heads of another width than hidden_size / heads"},
              {Trait::kScaledEmbedding, "a scaled embedding"},
              {Trait::kPlainEmbedding, "an embedding that is not scaled"},
              {Trait::kTiedHead, "an embedding that is the head as well"},
              {Trait::kNoShared, "a mixture without a shared expert"},
              {Trait::kGatedShared, "a gate on the shared expert"},
              {Trait::kUngatedShared, "a shared expert without a gate"},
              {Trait::kSharedBetween, "a shared expert whose width is no multiple of a routed expert's"},
              {Trait::kPlainWeights, "weights of the chosen experts that are not renormalised"},
              {Trait::kRenormalised, "renormalised weights of the chosen experts"},
              {Trait::kOneRenormalised, "a single chosen expert whose weight is 1"},
              {Trait::kScaledWeights, "a factor on the weights of the chosen experts"},
              {Trait::kSoftmaxScores, "scores of a softmax over all experts"},
              {Trait::kSigmoidScores, "scores of a sigmoid for each expert"},
              {Trait::kExpertGroups, "experts chosen out of the best groups"},
              {Trait::kChoiceBias, "a bias on the choice of the experts"},
              {Trait::kDenseFirst, "dense layers in front of the mixtures"},
              {Trait::kDenseBetween, "dense layers between or behind the mixtures"}}};

class Traits {
 public:
  constexpr Traits(std::initializer_list<Trait> traits) {
    for (const Trait t : traits) bits_ |= bit(t);
  }
  constexpr bool has(Trait t) const { return (bits_ & bit(t)) != 0; }
  constexpr bool none() const { return bits_ == 0; }
  constexpr Traits without(Traits other) const { return Traits(bits_ & ~other.bits_); }
  constexpr Traits operator|(Traits other) const { return Traits(bits_ | other.bits_); }
  constexpr Traits operator&(Traits other) const { return Traits(bits_ & other.bits_); }
  std::string words() const;  // "a gate on the shared expert; dense layers in front of the mixtures"

 private:
  constexpr explicit Traits(std::uint32_t bits) : bits_(bits) {}
  static constexpr std::uint32_t bit(Trait t) { return std::uint32_t{1} << static_cast<unsigned>(t); }
  std::uint32_t bits_ = 0;
};

Traits traits_of(const ModelConfig& config);

// What a run may give the routers of any family, as its checkpoints say it (configs/router_record.h); the files of a
// family that does not carry it cannot.
inline constexpr Traits kRouterTraits{Trait::kScaledWeights, Trait::kSoftmaxScores, Trait::kSigmoidScores,
                                      Trait::kExpertGroups, Trait::kChoiceBias};

// What the layers of most decoders have.
inline constexpr Traits kPlainLayers{Trait::kRmsNorm, Trait::kSilu, Trait::kNoQkNorm, Trait::kPlainEmbedding,
                                     Trait::kTiedHead};

}  // namespace upmoe
