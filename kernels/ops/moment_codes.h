#pragma once
// Numbers of [0, 1] in 7 or 8 bits: floating point with 3 bits of fraction, in which 1 is the largest and has
// a code of its own. In integers alone, so that every processor has the same codes.
//
// Rounding is up or down by chance (`random`: 8 bits), so that a running mean of codes has the mean of what was
// rounded: a change smaller than half a step would otherwise never happen. random = kNearest rounds to the nearest.

#include <bit>
#include <cstdint>
#include <limits>

#include "kernels/core/bf16.h"
#include "kernels/core/philox.h"
#include "kernels/ops/newton.h"

namespace upmoe {

constexpr std::int64_t kMomentBlock = 256;  // elements that share a scale
constexpr std::uint32_t kNearest = 128;
constexpr int kRoundingRounds = 7;  // of philox, for the bits that rounding draws
constexpr int kRoundedAtOnce = 8;   // neighbours in the whole tensor that share a counter of philox

// The random bits of neighbour i of those that share a counter: the lower half is for its weight, the two bytes above
// for its moments. A word serves two neighbours, and the half of one's weight is that of the other's moments: the three
// roundings of an element share no bit.
//
//   word         | 16 bits            | 16 bits            |
//   neighbour 0    v       m            weight
//   neighbour 1    weight               v       m
constexpr std::uint32_t rounding_bits(std::uint32_t word, int i) {
  return i % 2 == 0 ? word : word << 16 | word >> 16;
}

// Top: the exponent field of 1; values below 2^(1-Top) are multiples of 2^(-2-Top). With 20 bits more, a code
// is the upper part of an fp32 of another exponent range, in which those small values are denormal numbers:
// one multiplication leads there, and back. A GPU takes that way; on processors, where denormal numbers are
// slow, small values are rounded to the same integers (nearest, ties to even) by the addition of 2^23.
template <int Top, bool kDenormals>
constexpr std::uint32_t fine_code(float x) {
  constexpr std::uint32_t kBias = 127 - Top;  // from a code's exponent to an fp32's
  if constexpr (kDenormals) {
    constexpr float kDown = std::bit_cast<float>((127 - kBias) << 23);
    return std::bit_cast<std::uint32_t>(x * kDown);
  } else {
    constexpr float kParts = static_cast<float>(std::uint64_t{1} << (Top + 2 + 20));
    const auto bits = std::bit_cast<std::uint32_t>(x);
    if (bits >> 23 <= kBias) return std::bit_cast<std::uint32_t>(x * kParts + 8388608.0f) - 0x4b000000u;
    return bits - (kBias << 23);
  }
}

template <int Top, bool kDenormals>
constexpr std::uint32_t encode_unit(float x, std::uint32_t random) {
  const std::uint32_t code = (fine_code<Top, kDenormals>(x) + (random << 12 | 0x800u)) >> 20;
  return code < (Top << 3) ? code : Top << 3;
}

// fine: a code with 20 bits of nothing behind it.
template <int Top>
constexpr float decode_fine(std::uint32_t fine) {
  constexpr float kUp = std::bit_cast<float>((254u - Top) << 23);
  return std::bit_cast<float>(fine) * kUp;
}

template <int Top, bool kDenormals>
constexpr float decode_unit(std::uint32_t code) {
  constexpr std::uint32_t kBias = 127 - Top;
  if constexpr (kDenormals) {
    return decode_fine<Top>(code << 20);
  } else {
    constexpr float kPart = 1.0f / static_cast<float>(std::uint64_t{1} << (Top + 2));
    // Both, and one by a mask: a branch would keep the compiler from making vectors of a loop of these.
    const auto small = std::bit_cast<std::uint32_t>(static_cast<float>(code) * kPart);
    const std::uint32_t large = (code + (kBias << 3)) << 20, is_small = code < 8 ? ~0u : 0u;
    return std::bit_cast<float>((small & is_small) | (large & ~is_small));
  }
}

// First moment: a sign and 7 bits, down to 2^-17 of the block's largest. x in [-1, 1].
template <bool kDenormals = false>
constexpr std::uint8_t encode_first(float x, std::uint32_t random) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  const float size = std::bit_cast<float>(bits & 0x7fffffffu);
  return static_cast<std::uint8_t>(bits >> 31 << 7 | encode_unit<15, kDenormals>(size, random));
}
template <bool kDenormals = false>
constexpr float decode_first(std::uint8_t code) {
  const float size = decode_unit<15, kDenormals>(code & 0x7fu);
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(size) | (code & 0x80u) << 24);
}

// Second moment: 8 bits, down to 2^-33 of the block's largest. What is not zero stays so: an element that is
// divided by the root of nothing would leap. x in [0, 1].
template <bool kDenormals = false>
constexpr std::uint8_t encode_second(float x, std::uint32_t random) {
  const std::uint32_t code = encode_unit<31, kDenormals>(x, random), bits = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t least = bits < 1 ? bits : 1;
  return static_cast<std::uint8_t>(code > least ? code : least);
}
template <bool kDenormals = false>
constexpr float decode_second(std::uint8_t code) {
  return decode_unit<31, kDenormals>(code);
}

// What a block is multiplied by to lie in [0, 1], or next to it; 0 for a block of nothing (or of numbers below fp32's
// normal ones, which are taken for it), and of one that has overflowed.
constexpr float inverse_of_scale(float scale) {
  const bool huge = scale > 0x1p125f;
  const float part = huge ? 0x1p-64f : 1.0f, inverse = newton_reciprocal(scale * part) * part;
  return scale >= 0x1p-126f && scale <= std::numeric_limits<float>::max() ? inverse : 0.0f;
}

// To bf16, up or down by chance (16 bits), so that the mean of many roundings is x. Infinity and NaN stay
// (x is a result of arithmetic, so a NaN is a quiet one, whose upper half is a NaN too).
constexpr bf16 round_by_chance(float x, std::uint32_t random) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  const bool finite = (bits & 0x7fffffffu) < 0x7f800000u;
  return bf16{static_cast<std::uint16_t>((bits + (finite ? random : 0)) >> 16)};
}

}  // namespace upmoe
