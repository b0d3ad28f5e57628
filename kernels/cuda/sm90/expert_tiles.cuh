#pragma once
// Which tile of which expert a block computes: pure functions of the experts' offsets, for device and host alike.
//
// Rows are cut into tiles of 128. A cluster of two blocks takes two neighbouring row tiles of one column
// tile, so that both need the same weights; where an expert has an odd number of row tiles, its last one is
// taken with two neighbouring columns instead, and nothing is shared. Within an expert rows run fastest, so
// that a panel of weights is used up while it is in the cache, or columns (TileOrder).

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/core/expert_variant.h"
#include "kernels/cuda/sm90/experts.cuh"

namespace upmoe::cuda::sm90 {

constexpr int kTileRows = 128;

struct RowTile {
  int expert;
  int first_row, rows;  // of all rows; how many of the 128 exist
  int column;           // in tiles
  bool shared;          // the blocks of the cluster have the same column
};

__host__ __device__ constexpr int row_tiles(int rows) {
  return (rows + kTileRows - 1) / kTileRows;
}
// What a cluster of `blocks` blocks (1 or 2) takes at a time from an expert with that many rows.
__host__ __device__ constexpr int units_of_expert(int rows, int columns, int blocks) {
  const int tiles = row_tiles(rows);
  return blocks == 1 ? tiles * columns : tiles / 2 * columns + tiles % 2 * ((columns + 1) / 2);
}

// The expert whose units hold unit `unit`; first_unit has experts + 1 entries.
__host__ __device__ constexpr int expert_of_unit(int unit, const int* first_unit, int experts) {
  int low = 0, high = experts;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (first_unit[middle] <= unit ? low : high) = middle;
  }
  return low;
}

// The tile of block `rank` in unit `within` of an expert with rows [begin, end).
__host__ __device__ constexpr RowTile tile_of_unit(int within, int expert, int begin, int end, int columns,
                                                   int blocks, int rank, TileOrder order = TileOrder::kRows) {
  const int tiles = row_tiles(end - begin), groups = tiles / blocks;
  RowTile tile{expert, 0, 0, 0, true};
  int row_tile = 0;
  bool exists = true;
  if (within < groups * columns) {
    const bool by_rows = order == TileOrder::kRows;
    row_tile = (by_rows ? within % groups : within / columns) * blocks + rank;
    tile.column = by_rows ? within / groups : within % columns;
  } else {
    row_tile = tiles - 1;
    tile.column = (within - groups * columns) * blocks + rank;
    tile.shared = false;
    exists = tile.column < columns;
    if (!exists) tile.column = columns - 1;
  }
  tile.first_row = begin + row_tile * kTileRows;
  const int left = end - tile.first_row;
  tile.rows = !exists ? 0 : left < kTileRows ? left : kTileRows;
  return tile;
}

// Offsets and units of all experts in shared memory, where every thread finds its next tile without going to memory.
template <TileOrder kOrder>
struct RowTileTable {
  int experts, columns;
  int offsets[kMostExperts + 1], first_unit[kMostExperts + 1];

  // All threads of the block call it.
  __device__ void fill(const int* expert_offsets, int experts_, int columns_, int blocks) {
    if (threadIdx.x == 0) {
      experts = experts_;
      columns = columns_;
    }
    for (int e = static_cast<int>(threadIdx.x); e <= experts_; e += static_cast<int>(blockDim.x))
      offsets[e] = expert_offsets[e];
    __syncthreads();
    if (threadIdx.x == 0) {
      first_unit[0] = 0;
      for (int e = 0; e < experts_; ++e)
        first_unit[e + 1] = first_unit[e] + units_of_expert(offsets[e + 1] - offsets[e], columns_, blocks);
    }
    __syncthreads();
  }
  // False behind the last unit.
  __device__ bool find(RowTile& tile, int unit, int blocks, int rank) const {
    if (unit >= first_unit[experts]) return false;
    const int e = expert_of_unit(unit, first_unit, experts);
    tile = tile_of_unit(unit - first_unit[e], e, offsets[e], offsets[e + 1], columns, blocks, rank, kOrder);
    return true;
  }
};

}  // namespace upmoe::cuda::sm90
