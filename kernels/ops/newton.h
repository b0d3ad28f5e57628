#pragma once
// Square roots and reciprocals that have the same bits on every device: a first guess from the integer that a number's
// bits are, then steps of Newton's kind in fused multiply-adds, each of which has one result wherever it is computed.
// No division, no branch, no table. No product here is added to anything but by std::fma, so that no compiler joins the
// two differently.

#include <bit>
#include <cmath>
#include <cstdint>

namespace upmoe {

// sqrt(x) for x of [0, FLT_MAX]: 0 of 0; a relative error of at most 2^-23 for numbers that are normal, and an absolute
// one of at most 2^-63 below them. Of infinity, NaN.
constexpr float newton_root(float x) {
  // 1/sqrt(x) within 3.5 %, then within 2^-13: y (1 + e/2 + 3/8 e^2) with e = 1 - x y^2.
  const float guess = std::bit_cast<float>(0x5f3759dfu - (std::bit_cast<std::uint32_t>(x) >> 1));
  const float e = std::fma(-(x * guess), guess, 1.0f);
  const float y = std::fma(guess * e, std::fma(e, 0.375f, 0.5f), guess);
  // Of the root itself, what is missing to its square shows how far it is off.
  const float root = x * y;
  return std::fma(std::fma(-root, root, x), 0.5f * y, root);
}

// 1/x for x of [2^-126, 2^125], within a relative error of 2^-23.
constexpr float newton_reciprocal(float x) {
  // Within 5 %, then within 2^-12: y (1 + e + e^2) with e = 1 - x y; then y (1 + e).
  const float guess = std::bit_cast<float>(0x7ef311c7u - std::bit_cast<std::uint32_t>(x));
  const float e = std::fma(-x, guess, 1.0f);
  const float y = std::fma(std::fma(e, e, e), guess, guess);
  return std::fma(std::fma(-x, y, 1.0f), y, y);
}

}  // namespace upmoe
