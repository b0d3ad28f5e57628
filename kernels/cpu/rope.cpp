#include <algorithm>
#include <cmath>

#include "kernels/cpu/parallel_for.h"
#include "kernels/cpu/row_sums.h"
#include "kernels/cpu/simd.h"
#include "kernels/ops/attention.h"
#include "kernels/ops/backend.h"

namespace upmoe::cpu {

namespace {

constexpr std::int64_t kWide = 8;
using f64x8 = double __attribute__((vector_size(64)));
using i64x8 = std::int64_t __attribute__((vector_size(64)));

struct SinCos {
  f64x8 sin, cos;
};

// Angles reach max_position radians, where an fp32 reduction would lose the fraction; in fp64 the reduction
// by pi/2 is good to 1e-10 for angles up to 2^20, and the Taylor polynomials on [-pi/4, pi/4] to 1e-11: the
// results round to the nearest fp32.
SinCos sin_cos(f64x8 angle) {
  // Added and taken away it leaves the nearest whole number, as a double of this size has no fraction.
  const double round_to_integer = 6755399441055744.0;  // 1.5 * 2^52
  const f64x8 shifted = angle * 0.63661977236758134 + round_to_integer;
  const f64x8 n = shifted - round_to_integer;
  // pi/2 in two parts: the second is what the first lacks.
  const f64x8 r = (angle - n * 1.5707963267948966) - n * 6.123233995736766e-17;
  const f64x8 r2 = r * r;
  f64x8 s = r2 * (1.0 / 6227020800.0) - 1.0 / 39916800.0;
  s = s * r2 + 1.0 / 362880.0;
  s = s * r2 - 1.0 / 5040.0;
  s = s * r2 + 1.0 / 120.0;
  s = s * r2 - 1.0 / 6.0;
  s = s * r2 * r + r;
  f64x8 c = r2 * (1.0 / 479001600.0) - 1.0 / 3628800.0;
  c = c * r2 + 1.0 / 40320.0;
  c = c * r2 - 1.0 / 720.0;
  c = c * r2 + 1.0 / 24.0;
  c = c * r2 - 0.5;
  c = c * r2 + 1.0;
  // The low bits of `shifted` are n; quadrant n mod 4 swaps and negates.
  const i64x8 quadrant = std::bit_cast<i64x8>(shifted) & 3;
  const f64x8 sin_value = (quadrant & 1) != 0 ? c : s, cos_value = (quadrant & 1) != 0 ? s : c;
  const i64x8 negate_sin = quadrant & 2, negate_cos = (quadrant + 1) & 2;
  return {negate_sin != 0 ? -sin_value : sin_value, negate_cos != 0 ? -cos_value : cos_value};
}

// cos and sin of one position times every frequency, rounded to T; padded to whole vectors.
template <class T>
void fill_row(float* cos_row, float* sin_row, std::int32_t position, const float* frequency,
              std::int64_t padded) {
  for (std::int64_t i = 0; i < padded; i += kWide) {
    f64x8 angle;
    for (std::int64_t j = 0; j < kWide; ++j) {
      // Rounded, as transformers does.
      const float angle_f32 = static_cast<float>(position) * frequency[i + j];
      angle[j] = static_cast<double>(angle_f32);
    }
    const SinCos v = sin_cos(angle);
    for (std::int64_t j = 0; j < kWide; ++j) {
      cos_row[i + j] = to_float(from_float<T>(static_cast<float>(v.cos[j])));
      sin_row[i + j] = to_float(from_float<T>(static_cast<float>(v.sin[j])));
    }
  }
}

template <class T>
void rotate_head(T* x, const float* cos_row, const float* sin_row, std::int64_t half, float sign) {
  for_lanes(half, [&](std::int64_t i, auto lanes) {
    const f32x16 a = load(x + i, lanes), b = load(x + half + i, lanes);
    const f32x16 c = load(cos_row + i), s = load(sin_row + i) * sign;
    store(x + i, a * c - b * s, lanes);
    store(x + half + i, b * c + a * s, lanes);
  });
}

// As transformers computes them: theta^(2i/head_dim) in fp32, then its reciprocal.
void fill_frequencies(float* frequency, std::int64_t head_dim, std::int64_t padded, double theta) {
  std::fill_n(frequency, padded, 0.0f);
  for (std::int64_t i = 0; i < head_dim / 2; ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(head_dim);
    frequency[i] = 1.0f / std::pow(static_cast<float>(theta), exponent);
  }
}

// body(row_of, padded): row_of(t) has the `padded` cosines of token t's angles, then as many sines.
template <class T, class Body>
void with_table(Exec& ex, const ConstTensorView& positions_T, const AttentionShape& shape, double theta,
                Body&& body) {
  const auto* positions = positions_T.as<std::int32_t>();
  const std::int64_t tokens = positions_T.elements(), half = shape.head_dim / 2;
  const std::int64_t padded = (half + kLanes - 1) / kLanes * kLanes;
  ScratchScope scope(*ex.scratch);
  float* frequency = ex.scratch->take({padded}, DType::kF32, "rope frequencies").as<float>();
  fill_frequencies(frequency, shape.head_dim, padded, theta);
  // Packed sequences repeat their positions: one row of cos and sin for each position where that is fewer
  // rows than one for each token.
  const auto [lowest, highest] = std::minmax_element(positions, positions + tokens);
  const bool by_position = *lowest >= 0 && *highest < tokens;
  const std::int64_t rows = by_position ? *highest + 1 : tokens;
  float* table = ex.scratch->take({rows, 2 * padded}, DType::kF32, "rope table").as<float>();
  parallel_for(rows, 8 * padded, [&](std::int64_t r) {
    float* row = table + 2 * r * padded;
    fill_row<T>(row, row + padded, by_position ? static_cast<std::int32_t>(r) : positions[r], frequency,
                padded);
  });
  body([&](std::int64_t t) { return table + 2 * (by_position ? positions[t] : t) * padded; }, padded);
}

// The heads of queries and keys of one token; they stand first in its row.
template <class T>
void rotate_token(T* qkv, const float* row, std::int64_t padded, const AttentionShape& shape, float sign) {
  for (std::int64_t h = 0; h < shape.heads + shape.kv_heads; ++h)
    rotate_head(qkv + h * shape.head_dim, row, row + padded, shape.head_dim / 2, sign);
}

}  // namespace

void rope(Exec& ex, TensorView qkv_TH, ConstTensorView positions_T, AttentionShape shape, double theta,
          bool inverse) {
  const std::int64_t tokens = qkv_TH.shape[0], width = qkv_TH.shape[1];
  if (tokens == 0) return;
  with_float_type(qkv_TH.dtype, [&](auto type) {
    auto* qkv = qkv_TH.as<decltype(type)>();
    with_table<decltype(type)>(ex, positions_T, shape, theta, [&](const auto& row_of, std::int64_t padded) {
      parallel_for(tokens, (shape.heads + shape.kv_heads) * shape.head_dim, [&](std::int64_t t) {
        rotate_token(qkv + t * width, row_of(t), padded, shape, inverse ? -1.0f : 1.0f);
      });
    });
  });
}

// The sum in the order of bias_backward.
void rope_backward(Exec& ex, TensorView dqkv_TH, GradientView db_H, ConstTensorView positions_T,
                   AttentionShape shape, double theta) {
  const std::int64_t tokens = dqkv_TH.shape[0], width = dqkv_TH.shape[1];
  if (tokens == 0) {
    if (!db_H.adds()) fill(ex, db_H, 0.0f);
    return;
  }
  ScratchScope scope(*ex.scratch);
  float* partials =
      ex.scratch->take({row_blocks(tokens), width}, DType::kF32, "rope_backward sums").as<float>();
  with_float_type(dqkv_TH.dtype, [&](auto type) {
    auto* dqkv = dqkv_TH.as<decltype(type)>();
    with_table<decltype(type)>(ex, positions_T, shape, theta, [&](const auto& row_of, std::int64_t padded) {
      for_row_blocks(partials, tokens, width, [&](std::int64_t first, std::int64_t last, float* partial) {
        for (std::int64_t t = first; t < last; ++t) {
          auto* row = dqkv + t * width;
          rotate_token(row, row_of(t), padded, shape, -1.0f);
          for_lanes(width, [&](std::int64_t i, auto lanes) {
            store(partial + i, load(partial + i, lanes) + load(row + i, lanes), lanes);
          });
        }
      });
    });
  });
  add_row_blocks(db_H, partials, row_blocks(tokens));
}

}  // namespace upmoe::cpu
