#pragma once
// Rows of logits, as losses read them.

#include <algorithm>
#include <limits>

#include "kernels/cpu/simd.h"
#include "kernels/cpu/vector_math.h"
#include "kernels/ops/findings.h"

namespace upmoe::cpu {

// Blocks of a row are summed in fp32 and added up in fp64: 151936 terms in fp32 alone would cost three digits.
constexpr std::int64_t kSumBlock = 1024;

inline float row_max(const float* x, std::int64_t n) {
  f32x16 m = splat(-std::numeric_limits<float>::infinity());
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) m = max(load(x + i), m);
  float result = reduce_max(m);
  for (; i < n; ++i) result = std::max(result, x[i]);
  return result;
}

inline void check_targets(const std::int32_t* targets, std::int64_t rows, std::int64_t vocab) {
  for (std::int64_t c = 0; c < rows; ++c)
    if (targets[c] < -1 || targets[c] >= vocab) fail_target(targets[c], c, vocab);
}

}  // namespace upmoe::cpu
