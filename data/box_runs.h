#pragma once
// Where a region that two boxes share lies in each of them.

#include <array>

#include "parallel/layout.h"

namespace upmoe {

// How a region that is part of two boxes lies in one of them: flat offset of its element at `index` (relative
// to the region's corner).
inline std::int64_t flat_in(const Box& box, const Box& region, const std::array<std::int64_t, 4>& index) {
  std::int64_t at = 0;
  for (int d = 0; d < box.extent.rank; ++d) {
    const auto i = static_cast<std::size_t>(d);
    at = at * box.extent[d] + (region.offset[d] - box.offset[d] + index[i]);
  }
  return at;
}

// Calls run(flat offset in a, flat offset in b, elements) for runs of `region` that are contiguous in both boxes.
template <class Run>
void for_runs(const Box& a, const Box& b, const Box& region, const Run& run) {
  const int rank = region.extent.rank;
  if (region.elements() == 0) return;
  if (rank == 0) return run(0, 0, 1);
  int split = rank - 1;  // dims behind `split` are whole in both boxes
  std::int64_t length = region.extent[split];
  while (split > 0 && region.extent[split] == a.extent[split] && region.extent[split] == b.extent[split])
    length *= region.extent[--split];
  std::int64_t runs = 1;
  for (int d = 0; d < split; ++d) runs *= region.extent[d];
  for (std::int64_t r = 0; r < runs; ++r) {
    std::array<std::int64_t, 4> index{};
    std::int64_t rest = r;
    for (int d = split - 1; d >= 0; --d) {
      index[static_cast<std::size_t>(d)] = rest % region.extent[d];
      rest /= region.extent[d];
    }
    run(flat_in(a, region, index), flat_in(b, region, index), length);
  }
}

}  // namespace upmoe
