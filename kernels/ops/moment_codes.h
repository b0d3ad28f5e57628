#pragma once
// Numbers of [0, 1] in 7 or 8 bits: floating point with 3 bits of fraction, in which 1 is the largest and has
// a code of its own. In integers alone, so that every processor has the same codes.
//
// Rounding is up or down by chance (`random`: 8 bits), so that a running mean of codes has the mean of what
// was rounded: a change smaller than half a step would otherwise never happen. random = kNearest rounds to
// the nearest.

#include <bit>
#include <cstdint>

#include "kernels/core/bf16.h"

namespace upmoe {

constexpr std::int64_t kMomentBlock = 256;  // elements that share a scale
constexpr std::uint32_t kNearest = 128;

// Top: the exponent field of 1; values below 2^(1-Top) are multiples of 2^(-2-Top).
template <int Top>
constexpr std::uint32_t encode_unit(float x, std::uint32_t random) {
  constexpr std::uint32_t kBias = 127 - Top;  // from a code's exponent to an fp32's
  constexpr float kParts = static_cast<float>(std::uint64_t{1} << (Top + 2 + 8));
  const auto bits = std::bit_cast<std::uint32_t>(x);
  if (bits >> 23 <= kBias) return (static_cast<std::uint32_t>(x * kParts) + random) >> 8;
  const std::uint32_t code = ((bits + (random << 12 | 0x800u)) >> 20) - (kBias << 3);
  return code < (Top << 3) ? code : Top << 3;
}

template <int Top>
constexpr float decode_unit(std::uint32_t code) {
  constexpr std::uint32_t kBias = 127 - Top;
  constexpr float kPart = 1.0f / static_cast<float>(std::uint64_t{1} << (Top + 2));
  if (code < 8) return static_cast<float>(code) * kPart;
  return std::bit_cast<float>((code + (kBias << 3)) << 20);
}

// First moment: a sign and 7 bits, down to 2^-17 of the block's largest. x in [-1, 1].
constexpr std::uint8_t encode_first(float x, std::uint32_t random) {
  const std::uint32_t sign = std::bit_cast<std::uint32_t>(x) >> 31;
  return static_cast<std::uint8_t>(sign << 7 | encode_unit<15>(sign != 0 ? -x : x, random));
}
constexpr float decode_first(std::uint8_t code) {
  const float size = decode_unit<15>(code & 0x7fu);
  return (code & 0x80u) != 0 ? -size : size;
}

// Second moment: 8 bits, down to 2^-33 of the block's largest. What is not zero stays so: an element that is
// divided by the root of nothing would leap. x in [0, 1].
constexpr std::uint8_t encode_second(float x, std::uint32_t random) {
  const std::uint32_t code = encode_unit<31>(x, random);
  return static_cast<std::uint8_t>(code == 0 && x > 0 ? 1 : code);
}
constexpr float decode_second(std::uint8_t code) {
  return decode_unit<31>(code);
}

// What a block is divided by to lie in [0, 1]; 0 for a block of nothing (or of numbers below fp32's normal
// ones, which are taken for it).
constexpr float inverse_of_scale(float scale) {
  return scale < 1.1754944e-38f ? 0.0f : 1.0f / scale;
}

// To bf16, up or down by chance (16 bits), so that the mean of many roundings is x.
constexpr bf16 round_by_chance(float x, std::uint32_t random) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  if ((bits & 0x7f800000u) == 0x7f800000u) return to_bf16(x);  // not finite
  return bf16{static_cast<std::uint16_t>((bits + random) >> 16)};
}

}  // namespace upmoe
