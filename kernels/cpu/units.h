#pragma once
// What products in registers read, packed: fp32 numbers, or pairs of bf16 neighbours in depth where the processor has
// an instruction that multiplies pairs and adds both products to an fp32 sum.
//
//   depth          0     1     2     3               Operands lie with all outer indices of a unit side by side, or
//   units of bf16 [0 . . 1]   [2 . . 3]              with the units of an outer index side by side.

#include <algorithm>
#include <bit>
#include <cstring>
#include <type_traits>
#include <utility>

#include "kernels/cpu/simd.h"

namespace upmoe::cpu {

// Elements of one unit.
template <class Unit>
inline constexpr std::int64_t kPerUnit = std::is_same_v<Unit, std::uint32_t> ? 2 : 1;

// What elements of T are packed as; bf16 without that instruction is widened.
#ifdef __AVX512BF16__
template <class T>
using UnitOf = std::conditional_t<std::is_same_v<T, bf16>, std::uint32_t, float>;
#else
template <class T>
using UnitOf = float;
#endif

template <class Unit>
constexpr std::int64_t units_of(std::int64_t depth) {
  return (depth + kPerUnit<Unit> - 1) / kPerUnit<Unit>;
}

// Of memory that may hold elements of T, at any of its addresses.
template <class Unit>
inline Unit load_unit(const Unit* p) {
  Unit unit;
  std::memcpy(&unit, p, sizeof unit);
  return unit;
}
// One register of units, and sums of products of two, or of one unit and a register.
inline Register load_unit_register(const float* p) {
  return load_register(p);
}
// Fused by name: gcc fuses most sums of products by itself, not all, and tiles must round alike.
inline Register multiply_add(Register sum, Register a, Register b) {
#if defined(__AVX512F__)
  return std::bit_cast<Register>(
      _mm512_fmadd_ps(std::bit_cast<__m512>(a), std::bit_cast<__m512>(b), std::bit_cast<__m512>(sum)));
#elif defined(__AVX__) && defined(__FMA__)
  return std::bit_cast<Register>(
      _mm256_fmadd_ps(std::bit_cast<__m256>(a), std::bit_cast<__m256>(b), std::bit_cast<__m256>(sum)));
#else
  return sum + a * b;
#endif
}
inline Register multiply_add(Register sum, float a, Register b) {
  return multiply_add(sum, splat_register(a), b);
}
#ifdef __AVX512BF16__
inline u32x16 load_unit_register(const std::uint32_t* p) {
  u32x16 units;
  std::memcpy(&units, p, sizeof units);
  return units;
}
inline f32x16 multiply_add(f32x16 sum, u32x16 a, u32x16 b) {
  return std::bit_cast<f32x16>(
      _mm512_dpbf16_ps(std::bit_cast<__m512>(sum), std::bit_cast<__m512bh>(a), std::bit_cast<__m512bh>(b)));
}
inline f32x16 multiply_add(f32x16 sum, std::uint32_t a, u32x16 b) {
  return multiply_add(sum, u32x16{} + a, b);
}
#endif

// Units of neighbouring outer indices at one depth of a depth-major operand: `in` is the first index's element, the
// depth's second element lies `stride` behind the first.
template <class T, class Lanes>
inline u32x16 load_depth_units(const T* in, std::int64_t stride, bool has_second, Lanes lanes) {
  const u32x16 first = std::bit_cast<u32x16>(load(in, lanes));  // lanes past the count are zero
  if constexpr (kPerUnit<UnitOf<T>> == 1) return first;
  const u32x16 second = has_second ? std::bit_cast<u32x16>(load(in + stride, lanes)) : u32x16{};
  return first >> 16 | second;
}

// body(u, first element of its depth, whether it has a second) for the units of a depth-major operand.
template <class T, class Body>
inline void for_depth_units(const T* in, std::int64_t stride, std::int64_t depth, Body&& body) {
  constexpr std::int64_t kPer = kPerUnit<UnitOf<T>>;
  for (std::int64_t u = 0; u < units_of<UnitOf<T>>(depth); ++u)
    body(u, in + u * kPer * stride, kPer == 2 && 2 * u + 1 < depth);
}

// Where packed units go: from one of the depth to the next, and from 16 outer indices to the next 16.
struct UnitStrides {
  std::int64_t unit, vector;
};
// Those of whole rows of `width` outer indices.
constexpr UnitStrides rows_of(std::int64_t width) {
  return {width, kLanes};
}

// out[u][0, width) = units of outer indices 0, 1, ... at depth u; zero past `count`. For depth-major operands.
template <class T>
inline void pack_depth_major(UnitOf<T>* out, UnitStrides strides, std::int64_t width, const T* in,
                             std::int64_t stride, std::int64_t count, std::int64_t depth) {
  // A part of every row: the processor by itself does not follow.
  constexpr std::int64_t kLine = 64 / static_cast<std::int64_t>(sizeof(T)), kRowsAhead = 16;
  const std::int64_t covered = (count + kLanes - 1) / kLanes * kLanes;
  for_depth_units(in, stride, depth, [&](std::int64_t u, const T* first, bool has_second) {
    for (std::int64_t row = kRowsAhead; row < kRowsAhead + kPerUnit<UnitOf<T>>; ++row)
      for (std::int64_t i = 0; i < count; i += kLine) __builtin_prefetch(first + row * stride + i);
    UnitOf<T>* to = out + u * strides.unit;
    const auto vector_at = [&](std::int64_t i) { return to + i / kLanes * strides.vector; };
    for_lanes(count, [&](std::int64_t i, auto lanes) {
      const u32x16 units = load_depth_units(first + i, stride, has_second, lanes);
      std::memcpy(vector_at(i), &units, sizeof units);
    });
    for (std::int64_t i = covered; i < width; i += kLanes) std::fill_n(vector_at(i), kLanes, UnitOf<T>{});
  });
}

// out[i][u] for i < count, with row stride `out_stride`. For a whose depth is contiguous.
template <class T>
inline void pack_rows(UnitOf<T>* out, std::int64_t out_stride, const T* in, std::int64_t stride,
                      std::int64_t count, std::int64_t depth) {
  for (std::int64_t i = 0; i < count; ++i, out += out_stride, in += stride) {
    if constexpr (kPerUnit<UnitOf<T>> == 1) {
      for_lanes(depth, [&](std::int64_t k, auto lanes) { store(out + k, load(in + k, lanes), lanes); });
    } else {
      if (depth % 2 != 0) out[depth / 2] = 0;
      if (depth > 0) std::memcpy(out, in, static_cast<std::size_t>(depth) * sizeof(T));
    }
  }
}

// Sixteen units from `in`, which has `left` elements; zeros where they end.
template <class T>
inline u32x16 load_units(const T* in, std::int64_t left) {
  if constexpr (kPerUnit<UnitOf<T>> == 1) {
    if (left >= kLanes) return std::bit_cast<u32x16>(load(in));
    return std::bit_cast<u32x16>(load(in, FirstLanes{left}));
  } else {
    u32x16 units{};
    std::memcpy(&units, in, static_cast<std::size_t>(std::min(left, 2 * kLanes)) * sizeof(T));
    return units;
  }
}

// One step of a transposition: blocks of kWidth lanes off the diagonal change places between a and b.
template <int kWidth, int... kLane>
inline void swap_blocks(u32x16& a, u32x16& b, std::integer_sequence<int, kLane...>) {
  const u32x16 upper = __builtin_shufflevector(a, b, ((kLane & kWidth) ? 16 + kLane - kWidth : kLane)...);
  b = __builtin_shufflevector(a, b, ((kLane & kWidth) ? 16 + kLane : kLane + kWidth)...);
  a = upper;
}
template <int kWidth>
inline void swap_blocks(u32x16 (&row)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    if ((i & kWidth) == 0)
      swap_blocks<kWidth>(row[i], row[i | kWidth], std::make_integer_sequence<int, kLanes>{});
}

// row[i][j] and row[j][i] change places.
inline void transpose(u32x16 (&row)[kLanes]) {
  swap_blocks<1>(row);
  swap_blocks<2>(row);
  swap_blocks<4>(row);
  swap_blocks<8>(row);
}

// out[u][i], as pack_depth_major, of rows whose depth is contiguous: 16 x 16 units are transposed in registers.
template <class T>
inline void pack_transposed(UnitOf<T>* out, UnitStrides strides, std::int64_t width, const T* in,
                            std::int64_t stride, std::int64_t count, std::int64_t depth) {
  constexpr std::int64_t kPrefetched = 256 / static_cast<std::int64_t>(sizeof(T));
  const std::int64_t units = units_of<UnitOf<T>>(depth);
  for (std::int64_t i = 0; i < width; i += kLanes) {
    for (std::int64_t u = 0; u < units; u += kLanes) {
      const std::int64_t k = u * kPerUnit<UnitOf<T>>;
      u32x16 row[kLanes];
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) {
        const T* from = in + (i + j) * stride + k;
        row[j] = i + j < count ? load_units(from, depth - k) : u32x16{};
        // Sixteen streams are more than the processor follows by itself.
        __builtin_prefetch(from + kPrefetched);
      }
      transpose(row);
      const std::int64_t rows = std::min(kLanes, units - u);
      UnitOf<T>* to = out + u * strides.unit + i / kLanes * strides.vector;
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j)  // from the registers where they are
        if (j < rows) std::memcpy(to + j * strides.unit, &row[j], sizeof row[j]);
    }
  }
}

}  // namespace upmoe::cpu
