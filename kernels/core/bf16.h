#pragma once
// bfloat16 on the host: the upper half of an fp32, rounded to nearest, ties to even; NaN stays NaN.

#include <bit>
#include <cstdint>

namespace upmoe {

struct bf16 {
  std::uint16_t bits = 0;
  friend bool operator==(bf16 a, bf16 b) = default;  // bitwise, so NaN == NaN
};

constexpr float to_float(float x) {
  return x;
}
constexpr float to_float(bf16 x) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16);
}

constexpr bf16 to_bf16(float x) {
  const auto u = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const std::uint32_t quiet_nan = (u >> 16) | 0x40u;
  return bf16{static_cast<std::uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded)};
}

// Converts an fp32 result to the element type T (float or bf16), rounding once.
template <class T>
constexpr T from_float(float x);
template <>
constexpr float from_float<float>(float x) {
  return x;
}
template <>
constexpr bf16 from_float<bf16>(float x) {
  return to_bf16(x);
}

}  // namespace upmoe
