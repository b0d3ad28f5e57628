#pragma once
// What the layers of one decoder do otherwise than those of another, in words of no family.

#include <cstdint>

#include "configs/names.h"

namespace upmoe {

// With n = x / sqrt(mean(x^2) + eps): kRms gives w n, kRmsPlusOne (1 + w) n, whose weights start at 0. kLayerNorm
// takes the mean from x first and has no bias.
enum class NormKind : std::uint8_t { kRms, kRmsPlusOne, kLayerNorm };
template <>
inline constexpr Names<NormKind> kNames<NormKind>{.built = {{NormKind::kRms, "rms"},
                                                            {NormKind::kRmsPlusOne, "rms_plus_one"},
                                                            {NormKind::kLayerNorm, "layernorm"}}};

// Of the gate in a feed-forward network: x sigmoid(x), or x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))).
enum class Activation : std::uint8_t { kSilu, kGeluTanh };
template <>
inline constexpr Names<Activation> kNames<Activation>{
    .built = {{Activation::kSilu, "silu"}, {Activation::kGeluTanh, "gelu_tanh"}}};

// kPerHead: each head of q and k is normed, before it is rotated, with a weight that all heads share.
enum class QkNorm : std::uint8_t { kNone, kPerHead };
template <>
inline constexpr Names<QkNorm> kNames<QkNorm>{
    .built = {{QkNorm::kNone, "none"}, {QkNorm::kPerHead, "per_head"}}};

}  // namespace upmoe
