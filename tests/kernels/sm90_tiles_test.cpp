// Which tile a block computes, as plain functions: over random routings every tile comes exactly once.

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>

#include "kernels/cuda/sm90/expert_tiles.cuh"

namespace upmoe::cuda::sm90 {
namespace {

TEST(Sm90Tiles, EveryTileOfEveryExpertComesOnce) {
  std::mt19937 random(3);
  for (int trial = 0; trial < 3000; ++trial) {
    const int experts = 1 + static_cast<int>(random() % 9), columns = 1 + static_cast<int>(random() % 12);
    const int blocks = 1 + trial % 2;
    std::vector<int> offsets{0}, first_unit{0};
    for (int e = 0; e < experts; ++e) {
      const int kinds[] = {0, 1, 127, 128, 129, 256, 257, static_cast<int>(random() % 2000)};
      offsets.push_back(offsets.back() + kinds[random() % 8]);
      first_unit.push_back(
          first_unit.back() +
          units_of_expert(offsets.back() - offsets[static_cast<std::size_t>(e)], columns, blocks));
    }
    std::map<std::pair<int, int>, int> seen;  // (first row, column tile) -> times
    for (int unit = 0; unit < first_unit.back(); ++unit) {
      const int e = expert_of_unit(unit, first_unit.data(), experts);
      const auto i = static_cast<std::size_t>(e);
      RowTile tiles[2];
      for (int rank = 0; rank < blocks; ++rank) {
        RowTile& t = tiles[rank];
        t = tile_of_unit(unit - first_unit[i], e, offsets[i], offsets[i + 1], columns, blocks, rank);
        ASSERT_EQ(t.expert, e);
        ASSERT_TRUE(t.column >= 0 && t.column < columns);
        if (t.rows == 0) continue;  // there is nothing for this block
        ASSERT_TRUE(t.first_row >= offsets[i] && (t.first_row - offsets[i]) % kTileRows == 0);
        ASSERT_EQ(t.rows, std::min(kTileRows, offsets[i + 1] - t.first_row));
        ++seen[{t.first_row, t.column}];
      }
      // What is shared must be the same for both.
      if (blocks == 1) continue;
      ASSERT_EQ(tiles[0].shared, tiles[1].shared);
      ASSERT_TRUE(!tiles[0].shared || tiles[0].column == tiles[1].column);
    }
    std::size_t tiles = 0;
    for (int e = 0; e < experts; ++e) {
      const auto i = static_cast<std::size_t>(e);
      tiles += static_cast<std::size_t>(row_tiles(offsets[i + 1] - offsets[i]) * columns);
    }
    ASSERT_EQ(seen.size(), tiles);
    for (const auto& [tile, times] : seen) ASSERT_EQ(times, 1);
  }
}

}  // namespace
}  // namespace upmoe::cuda::sm90
