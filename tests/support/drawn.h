#pragma once
// Numbers and orders that are drawn by counters: the same on every machine.

#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

#include "kernels/core/philox.h"

namespace upmoe::test {

// The i-th number of the series `what`.
inline std::uint32_t drawn(std::uint64_t what, std::uint64_t i) {
  return philox(what, i)[0];
}

// 0 ... n - 1 in an order of the seed's.
inline std::vector<std::int64_t> shuffled(std::int64_t n, std::uint64_t seed) {
  std::vector<std::int64_t> order(static_cast<std::size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  for (std::uint64_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[drawn(seed, i) % i]);
  return order;
}

}  // namespace upmoe::test
