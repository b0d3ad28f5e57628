// Which tile a block computes, and in which order experts come, as plain functions: over thousands of random routings,
// with experts that have no rows at the beginning, in the middle and at the end, every tile comes exactly once.

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <tuple>

#include "kernels/cuda/portable/expert_place.cuh"
#include "kernels/cuda/sm90/expert_tiles.cuh"
#include "kernels/cuda/sm90/experts_dweights.cuh"

namespace upmoe::cuda::sm90 {
namespace {

// Rows at the edges of tiles; the experts of a third at the beginning, in the middle or at the end may have none.
std::vector<int> random_offsets(std::mt19937& random, int trial) {
  const int experts = trial % 11 == 0 ? 60 : 1 + static_cast<int>(random() % 9);
  std::vector<int> offsets{0};
  for (int e = 0; e < experts; ++e) {
    const int kinds[] = {0, 1, 127, 128, 129, 256, 257, static_cast<int>(random() % 2000)};
    const bool none = trial % 4 < 3 && 3 * e / experts == trial % 4;
    offsets.push_back(offsets.back() + (none ? 0 : kinds[random() % 8]));
  }
  return offsets;
}

TEST(Sm90Tiles, EveryTileOfEveryExpertComesOnce) {
  std::mt19937 random(3);
  for (int trial = 0; trial < 3000; ++trial) {
    const auto offsets = random_offsets(random, trial);
    const int experts = static_cast<int>(offsets.size()) - 1, columns = 1 + static_cast<int>(random() % 12);
    const int blocks = 1 + trial % 2;
    const TileOrder order = trial / 2 % 2 == 0 ? TileOrder::kRows : TileOrder::kColumns;
    std::vector<int> first_unit{0};
    for (std::size_t e = 0; e + 1 < offsets.size(); ++e)
      first_unit.push_back(first_unit.back() + units_of_expert(offsets[e + 1] - offsets[e], columns, blocks));
    std::map<std::pair<int, int>, int> seen;  // (first row, column tile) -> times
    for (int unit = 0; unit < first_unit.back(); ++unit) {
      const int e = expert_of_unit(unit, first_unit.data(), experts);
      const auto i = static_cast<std::size_t>(e);
      RowTile tiles[2];
      for (int rank = 0; rank < blocks; ++rank) {
        RowTile& t = tiles[rank];
        t = tile_of_unit(unit - first_unit[i], e, offsets[i], offsets[i + 1], columns, blocks, rank, order);
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

TEST(Sm90Tiles, ExpertsComeByFallingRowsEachOnce) {
  std::mt19937 random(4);
  for (int trial = 0; trial < 3000; ++trial) {
    const auto offsets = random_offsets(random, trial);
    const int experts = static_cast<int>(offsets.size()) - 1;
    std::vector<int> ranking(static_cast<std::size_t>(experts), -1);
    for (int e = 0; e < experts; ++e) {
      const int place = cuda::place_by_rows(e, offsets.data(), experts);
      ASSERT_TRUE(place >= 0 && place < experts);
      ASSERT_EQ(ranking[static_cast<std::size_t>(place)], -1) << "two experts in a place";
      ranking[static_cast<std::size_t>(place)] = e;
    }
    const auto rows = [&](int e) {
      return offsets[static_cast<std::size_t>(e) + 1] - offsets[static_cast<std::size_t>(e)];
    };
    for (std::size_t i = 1; i < ranking.size(); ++i) {
      ASSERT_GE(rows(ranking[i - 1]), rows(ranking[i]));
      ASSERT_TRUE(rows(ranking[i - 1]) > rows(ranking[i]) || ranking[i - 1] < ranking[i]);
    }
  }
}

template <TileOrder kOrder>
void expect_every_tile_of_every_gradient() {
  std::mt19937 random(5);
  for (int trial = 0; trial < 3000; ++trial) {
    const auto offsets = random_offsets(random, trial);
    const int blocks = 1 + trial % 2;
    GradientTable<kOrder> table{};
    table.experts = static_cast<int>(offsets.size()) - 1;
    table.tiles_y = 1 + static_cast<int>(random() % 4);
    table.tiles_x = blocks * (1 + static_cast<int>(random() % 3));
    for (int e = 0; e < table.experts; ++e) {
      const int place = cuda::place_by_rows(e, offsets.data(), table.experts);
      table.ranking[place] = e;
      table.first_row[place] = offsets[static_cast<std::size_t>(e)];
      table.rows[place] = offsets[static_cast<std::size_t>(e) + 1] - table.first_row[place];
    }
    std::map<std::tuple<int, int, int>, int> seen;
    int unit = 0, longest = offsets.back();
    for (GradientTile t{}; table.find(t, unit, blocks, 0); ++unit) {
      const auto e = static_cast<std::size_t>(t.expert);
      ASSERT_EQ(t.first_row, offsets[e]);
      ASSERT_EQ(t.rows, offsets[e + 1] - offsets[e]);
      ASSERT_LE(t.rows, longest) << "a longer expert behind a shorter one";
      longest = t.rows;
      for (int rank = 0; rank < blocks; ++rank) {
        GradientTile of_block{};
        ASSERT_TRUE(table.find(of_block, unit, blocks, rank));
        ASSERT_EQ(of_block.expert, t.expert);
        ASSERT_EQ(of_block.y, t.y) << "what is shared is the same for both";
        ASSERT_EQ(of_block.x, t.x + rank);
        ASSERT_TRUE(of_block.y >= 0 && of_block.y < table.tiles_y && of_block.x >= 0 &&
                    of_block.x < table.tiles_x);
        ++seen[{t.expert, of_block.y, of_block.x}];
      }
    }
    ASSERT_EQ(seen.size(), static_cast<std::size_t>(table.experts * table.tiles_y * table.tiles_x));
    for (const auto& [tile, times] : seen) ASSERT_EQ(times, 1);
  }
}
TEST(Sm90Tiles, EveryTileOfEveryGradientComesOnceInTheOrderOfExperts) {
  expect_every_tile_of_every_gradient<TileOrder::kRows>();
  expect_every_tile_of_every_gradient<TileOrder::kColumns>();
}

TEST(Sm90Tiles, ComeInTheOrderOfAVariant) {
  // Four tiles of rows by three of columns, two rows of tiles at a time.
  const auto tiles = [](TileOrder order) {
    std::vector<std::pair<int, int>> all;
    for (int unit = 0; unit < units_of_expert(512, 3, 2); ++unit) {
      const RowTile t = tile_of_unit(unit, 0, 0, 512, 3, 2, 0, order);
      all.emplace_back(t.first_row, t.column);
    }
    return all;
  };
  using Tiles = std::vector<std::pair<int, int>>;
  EXPECT_EQ(tiles(TileOrder::kRows), (Tiles{{0, 0}, {256, 0}, {0, 1}, {256, 1}, {0, 2}, {256, 2}}));
  EXPECT_EQ(tiles(TileOrder::kColumns), (Tiles{{0, 0}, {0, 1}, {0, 2}, {256, 0}, {256, 1}, {256, 2}}));
}

}  // namespace
}  // namespace upmoe::cuda::sm90
