#pragma once
// Sixteen fp32 lanes as one value (GCC and Clang vector extensions): one AVX-512 register where the machine has
// it, several narrower ones where not. Explicit, because reductions and bf16 conversion do not vectorise reliably
// from plain loops without -ffast-math, and because a fixed number of lanes fixes the order of every sum.

#ifdef __AVX__
#include <immintrin.h>
#endif

#include <bit>
#include <cstdint>
#include <cstring>
#include <utility>

#include "kernels/core/bf16.h"

namespace upmoe::cpu {

constexpr std::int64_t kLanes = 16;

using f32x16 = float __attribute__((vector_size(64)));
using f32x8 = float __attribute__((vector_size(32)));
using f32x4 = float __attribute__((vector_size(16)));
using i32x16 = std::int32_t __attribute__((vector_size(64)));
using u32x16 = std::uint32_t __attribute__((vector_size(64)));
using u16x16 = std::uint16_t __attribute__((vector_size(32)));

// What one register holds of the sixteen lanes. Sums that live through a loop are declared as these: gcc
// keeps a vector that is wider than the machine's in memory, and a product that does so runs at a hundredth
// of its speed.
#if defined(__AVX512F__)
using Register = f32x16;
constexpr int kVectorsAtOnce = 4;  // whose sums for six rows fit the registers: 24 of 32
#elif defined(__AVX__)
using Register = f32x8;
constexpr int kVectorsAtOnce = 1;  // 12 of 16
#else
using Register = f32x4;
constexpr int kVectorsAtOnce = 1;
#endif
constexpr int kRegisterLanes = sizeof(Register) / sizeof(float);

// gcc 12 builds the conversion of sixteen out of two of eight and three more instructions, which the products of few
// rows spent their time on: this is one instruction.
inline u32x16 widen_words(u16x16 words) {
#ifdef __AVX512F__
  return std::bit_cast<u32x16>(_mm512_maskz_cvtepu16_epi32(0xffff, std::bit_cast<__m256i>(words)));
#else
  return __builtin_convertvector(words, u32x16);
#endif
}
inline f32x16 widen(u16x16 bits) {
  return std::bit_cast<f32x16>(widen_words(bits) << 16);
}

inline Register load_register(const float* p) {
  Register r;
  std::memcpy(&r, p, sizeof r);
  return r;
}
inline Register load_register(const bf16* p) {
  std::uint16_t __attribute__((vector_size(2 * kRegisterLanes))) bits;
  std::memcpy(&bits, p, sizeof bits);
#ifdef __AVX512F__
  return widen(bits);
#else
  using Wide = std::uint32_t __attribute__((vector_size(sizeof(Register))));
  return std::bit_cast<Register>(__builtin_convertvector(bits, Wide) << 16);
#endif
}
inline void store_register(float* p, Register r) {
  std::memcpy(p, &r, sizeof r);
}
inline Register splat_register(float x) {
  return x - Register{};
}

// Which lanes of a load or store touch memory; two types, so that whole vectors cost no test.
struct AllLanes {
  static constexpr std::int64_t count = kLanes;
};
struct FirstLanes {
  std::int64_t count;
};

inline f32x16 splat(float x) {
  return x - f32x16{};
}
inline i32x16 splat(std::int32_t x) {
  return x - i32x16{};
}
inline i32x16 lane_index() {
  return i32x16{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
}
// The second of the two where one is NaN. As one instruction each, which gcc makes of no comparison.
inline f32x16 max(f32x16 a, f32x16 b) {
#ifdef __AVX512F__
  return std::bit_cast<f32x16>(
      _mm512_maskz_max_ps(0xffff, std::bit_cast<__m512>(a), std::bit_cast<__m512>(b)));
#else
  return a > b ? a : b;
#endif
}
inline f32x16 min(f32x16 a, f32x16 b) {
#ifdef __AVX512F__
  return std::bit_cast<f32x16>(
      _mm512_maskz_min_ps(0xffff, std::bit_cast<__m512>(a), std::bit_cast<__m512>(b)));
#else
  return a < b ? a : b;
#endif
}

// The upper halves hold bf16, rounded to nearest, ties to even: to_bf16 of kernels/core/bf16.h in every lane.
inline u32x16 round_to_bf16_in_steps(f32x16 x) {
  const u32x16 u = std::bit_cast<u32x16>(x);
  const u32x16 rounded = u + 0x7fffu + ((u >> 16) & 1u);
  const u32x16 quiet_nan = u | 0x400000u;
  return ((u & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded) & 0xffff0000u;
}

#if defined(__AVX512BF16__) && defined(__AVX512DQ__)
// The processor's own conversion is that, but for numbers below 2^-126, which it takes for zero. (Ten instructions in
// one: they were a third of what an activation takes.)
[[gnu::noinline, gnu::cold]] inline u16x16 to_bf16_bits_of_subnormals(f32x16 x) {
  return __builtin_convertvector(round_to_bf16_in_steps(x) >> 16, u16x16);
}
inline u16x16 to_bf16_bits(f32x16 x) {
  constexpr int kSubnormal = 0x20;
  const __m512 lanes = std::bit_cast<__m512>(x);
  if (_mm512_fpclass_ps_mask(lanes, kSubnormal) != 0) [[unlikely]]
    return to_bf16_bits_of_subnormals(x);
  return std::bit_cast<u16x16>(_mm512_cvtneps_pbh(lanes));
}
inline u32x16 round_to_bf16_bits(f32x16 x) {
  return std::bit_cast<u32x16>(widen(to_bf16_bits(x)));
}
#else
inline u16x16 to_bf16_bits(f32x16 x) {
  return __builtin_convertvector(round_to_bf16_in_steps(x) >> 16, u16x16);
}
inline u32x16 round_to_bf16_bits(f32x16 x) {
  return round_to_bf16_in_steps(x);
}
#endif

// Sixteen pairs of bf16: the first below, the second above (little endian).
inline u32x16 bf16_pairs(f32x16 first, f32x16 second) {
  return widen_words(to_bf16_bits(first)) | widen_words(to_bf16_bits(second)) << 16;
}

// x as it is after a store in T and a load.
template <class T>
inline f32x16 rounded_to(f32x16 x);
template <>
inline f32x16 rounded_to<float>(f32x16 x) {
  return x;
}
template <>
inline f32x16 rounded_to<bf16>(f32x16 x) {
  return std::bit_cast<f32x16>(round_to_bf16_bits(x));
}

inline f32x16 load(const float* p, AllLanes = {}) {
  f32x16 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline f32x16 load(const bf16* p, AllLanes = {}) {
  u16x16 bits;
  std::memcpy(&bits, p, sizeof bits);
  return widen(bits);
}
inline void store(float* p, f32x16 v, AllLanes = {}) {
  std::memcpy(p, &v, sizeof v);
}
inline void store(bf16* p, f32x16 v, AllLanes = {}) {
  const u16x16 bits = to_bf16_bits(v);
  std::memcpy(static_cast<void*>(p), &bits, sizeof bits);
}

// Lanes past the count read as zero and are not written.
template <class T>
inline f32x16 load(const T* p, FirstLanes lanes) {
  T block[kLanes] = {};
  for (std::int64_t i = 0; i < lanes.count; ++i) block[i] = p[i];
  return load(block);
}
template <class T>
inline void store(T* p, f32x16 v, FirstLanes lanes) {
  T block[kLanes];
  store(block, v);
  for (std::int64_t i = 0; i < lanes.count; ++i) p[i] = block[i];
}

// Halves folded onto each other, always in the same order.
inline float reduce_add(f32x16 v) {
  const f32x8 a = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                  __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  const f32x4 b = __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
  const f32x4 c = b + __builtin_shufflevector(b, b, 2, 3, 0, 1);
  return c[0] + c[1];
}
// Neighbours of groups of kGroup lanes are folded onto each other: those of `a` fill the lower half, those of `b` the
// upper one.
template <int kGroup, int... kLane>
inline f32x16 fold_groups(f32x16 a, f32x16 b, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(a, b, (kLane / kGroup * 2 * kGroup + kLane % kGroup)...) +
         __builtin_shufflevector(a, b, (kLane / kGroup * 2 * kGroup + kGroup + kLane % kGroup)...);
}

// Lane i: reduce_add(v[i]), to the bit, for a third of its instructions.
//
//   kGroup 8    v0: 0-7 + 8-15 | v1: 0-7 + 8-15       4    v0 0-3 + 4-7 | v1 0-3 + 4-7 | v2 ... | v3 ...      2, 1
template <int kGroup = 8>
inline f32x16 reduce_add_each(f32x16 (&v)[kLanes]) {
#pragma GCC unroll 8
  for (int i = 0; i < kGroup; ++i)
    v[i] = fold_groups<kGroup>(v[2 * i], v[2 * i + 1], std::make_integer_sequence<int, kLanes>{});
  if constexpr (kGroup > 1) {
    return reduce_add_each<kGroup / 2>(v);
  } else {
    return v[0];
  }
}
inline float reduce_max(f32x16 v) {
  const f32x8 a = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7);
  const f32x8 b = __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  const f32x8 c = a > b ? a : b;
  const f32x4 d = __builtin_shufflevector(c, c, 0, 1, 2, 3), e = __builtin_shufflevector(c, c, 4, 5, 6, 7);
  const f32x4 f = d > e ? d : e;
  const f32x4 g = __builtin_shufflevector(f, f, 2, 3, 0, 1);
  const f32x4 h = f > g ? f : g;
  return h[0] > h[1] ? h[0] : h[1];
}

// body(i, lanes) for i = 0, 16, 32, ...: AllLanes, then FirstLanes once for what is left of n.
template <class Body>
inline void for_lanes(std::int64_t n, Body&& body) {
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, AllLanes{});
  if (i < n) body(i, FirstLanes{n - i});
}

// sum over i < n of term(i, lanes); four running vectors hide the latency of the additions.
template <class Term>
inline float sum_lanes(std::int64_t n, Term&& term) {
  f32x16 a{}, b{}, c{}, d{};
  std::int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    a += term(i, AllLanes{});
    b += term(i + kLanes, AllLanes{});
    c += term(i + 2 * kLanes, AllLanes{});
    d += term(i + 3 * kLanes, AllLanes{});
  }
  for (; i + kLanes <= n; i += kLanes) a += term(i, AllLanes{});
  if (i < n) b += term(i, FirstLanes{n - i});
  return reduce_add((a + b) + (c + d));
}

}  // namespace upmoe::cpu
