#pragma once
// Sums over the rows of a tensor, for weight gradients: fixed blocks of rows, each summed by one thread, then
// added up block after block. The order depends on the number of rows alone.

#include <algorithm>

#include "kernels/core/exec.h"
#include "kernels/cpu/parallel_for.h"
#include "kernels/cpu/simd.h"

namespace upmoe::cpu {

constexpr std::int64_t kRowBlock = 32;

inline std::int64_t row_blocks(std::int64_t rows) {
  return (rows + kRowBlock - 1) / kRowBlock;
}

// body(first, last, partial) for each block of rows; `partial`: the block's own `width` zeroed floats.
template <class Body>
inline void for_row_blocks(float* partials, std::int64_t rows, std::int64_t width, Body&& body) {
  parallel_for(row_blocks(rows), kRowBlock * width, [&](std::int64_t b) {
    float* partial = partials + b * width;
    std::fill_n(partial, width, 0.0f);
    body(b * kRowBlock, std::min(rows, (b + 1) * kRowBlock), partial);
  });
}

// total[i] (+)= sum over blocks of partials[block][i].
inline void add_row_blocks(const GradientView& total, const float* partials, std::int64_t blocks) {
  const std::int64_t width = total.elements();
  with_float_type(total.dtype, [&](auto type) {
    using T = decltype(type);
    T* out = total.as<T>();
    for_lanes(width, [&](std::int64_t i, auto lanes) {
      f32x16 sum{};
      for (std::int64_t b = 0; b < blocks; ++b) sum += load(partials + b * width + i, lanes);
      store(out + i, total.adds() ? load(out + i, lanes) + sum : sum, lanes);
    });
  });
}

}  // namespace upmoe::cpu
