#pragma once
// exp and what follows from it, sixteen lanes at a time: the C library's are scalar calls in a loop.

#include "kernels/cpu/simd.h"

namespace upmoe::cpu {

// e^x within 1.5 units in the last place (measured against double over the whole range, see the test).
// e^-inf = 0; NaN stays NaN; overflows to infinity above 88.73 as it should; flushes to zero below -86.98,
// where a correct result would still be a normal number near 1e-38: sums of probabilities cannot tell.
//
// x = n ln2 + r with |r| <= ln2/2; e^r = 1 + r + r^2 q(r), q minimax of degree 4 (relative error of e^r 3.1e-9).
inline f32x16 vector_exp(f32x16 x) {
  x = max(splat(-87.5f), min(splat(89.0f), x));  // NaN, as the second of both, passes
  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits.
  const float round_to_integer = 12582912.0f;
  const f32x16 shifted = x * 1.44269504088896341f + round_to_integer;
  const f32x16 n = shifted - round_to_integer;
  f32x16 r = x - n * 0.693145751953125f;  // ln2 in two parts; the product with the first is exact
  r = r - n * 1.42860682030941723e-6f;
  f32x16 q = r * 0.0013814598646664034f + 0.00836871687972814f;
  q = q * r + 0.041668388045313996f;
  q = q * r + 0.16666520631709497f;
  q = q * r + 0.49999993447796487f;
  const f32x16 e = (q * (r * r) + r) + 1.0f;
  // 2^(n-1) from its bits (0x4b400000 is the integer part of round_to_integer) and a doubling, so that n =
  // 128 works; n = -126 gives the bits of zero.
  const i32x16 exponent = std::bit_cast<i32x16>(shifted) - (0x4b400000 + 1 - 127);
  return (e + e) * std::bit_cast<f32x16>(exponent << 23);
}

// 1 / (1 + e^-x)
inline f32x16 vector_sigmoid(f32x16 x) {
  return 1.0f / (1.0f + vector_exp(-x));
}

}  // namespace upmoe::cpu
