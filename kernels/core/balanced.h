#pragma once
// How n things are dealt to `parts` in order: part i has [n*i/parts, n*(i+1)/parts). 60 over 8: 7 or 8 each.

#include <cstdint>

namespace upmoe {

// Where part `index` begins; of the part behind the last one, n. n * index itself may pass 2^63 for flat buffers on
// thousands of ranks.
constexpr std::int64_t balanced_begin(std::int64_t n, std::int64_t parts, std::int64_t index) {
  return n / parts * index + n % parts * index / parts;
}

}  // namespace upmoe
