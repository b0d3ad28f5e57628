#pragma once
// Rows and widths that norms are tested with: below, at and behind the lanes of a CPU's vectors, the packs of a GPU and
// the widest row that a block of it holds; no rows; more rows than are summed at once.

#include <utility>

namespace upmoe::test {

inline constexpr std::pair<int, int> kNormShapes[] = {{1, 3},    {3, 14},   {33, 16}, {5, 83},
                                                      {70, 28},  {2, 256},  {0, 32},  {1030, 8},
                                                      {3, 1032}, {1, 2064}, {2, 1031}};

}  // namespace upmoe::test
