#pragma once
// Standard normal numbers in bulk: THE definition of "random normal number i of stream `key`" for initialisation.
//
// Number i = 64 g + 16 w + l comes from the Philox block of counter 16 g + l, word w: Box-Muller over the
// word pairs 0,1 and 2,3, where the first word of a pair becomes the fp32 number (bits/2 + 1/2) 2^-31 under
// the logarithm and the second an angle of 2 pi bits 2^-32. Sixteen blocks side by side are what vector units
// want. Only + - * / sqrt and conversions are used, each rounded once by IEEE 754, and the file is compiled
// without contraction into fused multiply-adds: so a value depends on (key, i) alone, not on the range asked
// for, its alignment, the thread count or the processor.

#include <cstdint>

namespace upmoe {

// out[k] = number first + k of stream key, k < count. |value| <= 6.66.
void normal_batch(std::uint64_t key, std::uint64_t first, std::int64_t count, float* out);

// One of them; for many, the batch is far faster.
inline float normal_at(std::uint64_t key, std::uint64_t i) {
  float value = 0;
  normal_batch(key, i, 1, &value);
  return value;
}

}  // namespace upmoe
