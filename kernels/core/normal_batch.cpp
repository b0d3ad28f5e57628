#include "kernels/core/normal_batch.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace upmoe {
namespace {

constexpr int kLanes = 16;          // one AVX-512 register of 32-bit words, two of AVX2
constexpr int kGroup = 4 * kLanes;  // numbers made together

// Loops over l < kLanes below have a constant trip count and no branches, so that the compiler makes straight
// vector code of them (which wants -fno-math-errno -fno-trapping-math; neither changes a value).
using Words = std::uint32_t[kLanes];
using Floats = float[kLanes];

constexpr std::uint32_t kM0 = 0xD2511F53u, kM1 = 0xCD9E8D57u;  // Philox multipliers
constexpr std::uint32_t kW0 = 0x9E3779B9u, kW1 = 0xBB67AE85u;  // and Weyl increments of the key

// Philox4x32-10 of counters 16 group + l; the same bits as philox() of philox.h.
#ifdef __AVX512F__
// Each 32-bit word sits in the lower half of a 64-bit lane, where one instruction multiplies it; the
// compiler's own vectorisation of the loop below takes five times as long. What collects in the upper
// halves is never read.
inline void philox_half(std::uint64_t key, std::uint64_t first, std::uint32_t* c0, std::uint32_t* c1,
                        std::uint32_t* c2, std::uint32_t* c3) {
  const __m512i m0 = _mm512_set1_epi64(kM0), m1 = _mm512_set1_epi64(kM1);
  const __m512i lane = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
  __m512i w0 = _mm512_add_epi64(_mm512_set1_epi64(static_cast<long long>(first)), lane);
  __m512i w1 = _mm512_srli_epi64(w0, 32), w2 = _mm512_setzero_si512(), w3 = w2;
  auto k0 = static_cast<std::uint32_t>(key), k1 = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const __m512i p0 = _mm512_mul_epu32(w0, m0), p1 = _mm512_mul_epu32(w2, m1);
    w0 = _mm512_xor_si512(_mm512_xor_si512(_mm512_srli_epi64(p1, 32), w1), _mm512_set1_epi64(k0));
    w2 = _mm512_xor_si512(_mm512_xor_si512(_mm512_srli_epi64(p0, 32), w3), _mm512_set1_epi64(k1));
    w1 = p1;
    w3 = p0;
    k0 += kW0;
    k1 += kW1;
  }
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(c0), _mm512_cvtepi64_epi32(w0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(c1), _mm512_cvtepi64_epi32(w1));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(c2), _mm512_cvtepi64_epi32(w2));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(c3), _mm512_cvtepi64_epi32(w3));
}

inline void philox_lanes(std::uint64_t key, std::uint64_t group, Words& c0, Words& c1, Words& c2, Words& c3) {
  philox_half(key, group * kLanes, c0, c1, c2, c3);
  philox_half(key, group * kLanes + 8, c0 + 8, c1 + 8, c2 + 8, c3 + 8);
}
#else
inline std::uint32_t high_product(std::uint32_t a, std::uint32_t b) {
  return static_cast<std::uint32_t>((std::uint64_t{a} * b) >> 32);
}

inline void philox_lanes(std::uint64_t key, std::uint64_t group, Words& c0, Words& c1, Words& c2, Words& c3) {
  // A multiple of 16, so adding l never carries into the upper word.
  const std::uint64_t first = group * kLanes;
  for (int l = 0; l < kLanes; ++l) {
    c0[l] = static_cast<std::uint32_t>(first) + static_cast<std::uint32_t>(l);
    c1[l] = static_cast<std::uint32_t>(first >> 32);
    c2[l] = 0;
    c3[l] = 0;
  }
  auto k0 = static_cast<std::uint32_t>(key), k1 = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int l = 0; l < kLanes; ++l) {
      const std::uint32_t hi0 = high_product(kM0, c0[l]), hi1 = high_product(kM1, c2[l]);
      const std::uint32_t lo0 = kM0 * c0[l], lo1 = kM1 * c2[l];
      c0[l] = hi1 ^ c1[l] ^ k0;
      c2[l] = hi0 ^ c3[l] ^ k1;
      c1[l] = lo1;
      c3[l] = lo0;
    }
    k0 += kW0;
    k1 += kW1;
  }
}
#endif

// sqrt(-2 log u), u = (bits/2 + 1/2) 2^-31 in (0, 1]. log by exponent and atanh series: with s = (m-1)/(m+1), log
// m = 2 (s + s^3/3 + s^5/5 + ...), |s| <= 0.172 for m in [sqrt(1/2), sqrt 2): the first term left out is 2e-10.
inline float radius_of(std::uint32_t bits) {
  const float u = (static_cast<float>(static_cast<std::int32_t>(bits >> 1)) + 0.5f) * 0x1p-31f;
  const auto word = static_cast<std::int32_t>(std::bit_cast<std::uint32_t>(u));
  const std::int32_t exponent = (word - 0x3f3504f3) >> 23;  // 0x3f3504f3 is sqrt(1/2)
  const float m = std::bit_cast<float>(static_cast<std::uint32_t>(word - exponent * (1 << 23)));
  const float s = (m - 1.0f) / (m + 1.0f);
  const float z = s * s;
  const float series = ((((1.0f / 11 * z + 1.0f / 9) * z + 1.0f / 7) * z + 1.0f / 5) * z + 1.0f / 3) * z;
  const float log_m = 2.0f * (s + s * series);
  const float log_u = static_cast<float>(exponent) * 0.693147181f + log_m;
  const float square = -2.0f * log_u;
  return std::sqrt(square > 0.0f ? square : 0.0f);
}

// cos and sin of the angle 2 pi bits / 2^32: the quadrant from the two upper bits after rounding, Taylor series on
// [-pi/4, pi/4] (first terms left out 2e-9 and 1e-10).
inline void cos_sin_of(std::uint32_t bits, float& cosine, float& sine) {
  const std::uint32_t quadrant = (bits + 0x20000000u) >> 30;
  const auto rest = static_cast<std::int32_t>(bits - (quadrant << 30));  // in [-2^29, 2^29)
  const float t = static_cast<float>(rest) * (0x1p-30f * 1.57079632679f);
  const float z = t * t;
  const float s = t + t * z * (-1.0f / 6 + z * (1.0f / 120 + z * (-1.0f / 5040 + z * (1.0f / 362880))));
  const float c =
      1.0f + z * (-0.5f + z * (1.0f / 24 + z * (-1.0f / 720 + z * (1.0f / 40320 + z * (-1.0f / 3628800)))));
  const auto sin_bits = std::bit_cast<std::uint32_t>(s), cos_bits = std::bit_cast<std::uint32_t>(c);
  const std::uint32_t swap = 0u - (quadrant & 1u);  // all ones in the odd quadrants, where cosine is +-sine
  const std::uint32_t cos_sign = ((quadrant + 1u) & 2u) << 30, sin_sign = (quadrant & 2u) << 30;
  cosine = std::bit_cast<float>(((sin_bits & swap) | (cos_bits & ~swap)) ^ cos_sign);
  sine = std::bit_cast<float>(((cos_bits & swap) | (sin_bits & ~swap)) ^ sin_sign);
}

inline void box_muller(const Words& u, const Words& v, float* __restrict first, float* __restrict second) {
  for (int l = 0; l < kLanes; ++l) {
    const float radius = radius_of(u[l]);
    float c = 0, s = 0;
    cos_sin_of(v[l], c, s);
    first[l] = radius * c;
    second[l] = radius * s;
  }
}

// 64 numbers of 16 counters. A counter gives four words, two of them a pair (u, v) for Box-Muller, and a pair two
// numbers:
//
//   c0, c1 of 16 counters  ->  out[0..16) = radius cos, out[16..32) = radius sin
//   c2, c3                 ->  out[32..48),             out[48..64)
inline void normal_group(std::uint64_t key, std::uint64_t group, float* out) {
  alignas(64) Words c0, c1, c2, c3;
  philox_lanes(key, group, c0, c1, c2, c3);
  box_muller(c0, c1, out, out + kLanes);
  box_muller(c2, c3, out + 2 * kLanes, out + 3 * kLanes);
}

}  // namespace

void normal_batch(std::uint64_t key, std::uint64_t first, std::int64_t count, float* out) {
  alignas(64) float group_values[kGroup];
  while (count > 0) {
    // Number i is always made in group i / 64, so a run has the same values wherever it begins; only ends of it are
    // made in vain.
    const std::uint64_t group = first / kGroup;
    const auto skip = static_cast<std::int64_t>(first % kGroup);
    if (skip == 0 && count >= kGroup) {
      normal_group(key, group, out);
      first += kGroup, out += kGroup, count -= kGroup;
      continue;
    }
    const std::int64_t take = std::min<std::int64_t>(count, kGroup - skip);
    normal_group(key, group, group_values);
    std::memcpy(out, group_values + skip, static_cast<std::size_t>(take) * sizeof(float));
    first += static_cast<std::uint64_t>(take), out += take, count -= take;
  }
}

}  // namespace upmoe
