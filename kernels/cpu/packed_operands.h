#pragma once
// The factors of products on packed blocks (packed_gemm.h), packed: a by the rows of tiles, b by panels of columns.

#include <algorithm>
#include <cstring>
#include <utility>

#include "kernels/cpu/units.h"

namespace upmoe::cpu {

// a(m, k) or b(k, n) with "outer" index m or n: data[outer * stride + k], or data[k * stride + outer] if depth_major.
template <class T>
struct Operand {
  const T* data;
  std::int64_t stride;
  bool depth_major;
};

constexpr std::int64_t kTileRows = 6;                         // 6 x 4 vectors of sums fill 24 of 32 registers
constexpr std::int64_t kPanelColumns = 4 * kLanes;            // columns of a packed panel of b
constexpr std::int64_t kBlockRows = 8 * kTileRows;            // rows of a that are packed together
constexpr std::int64_t kPackedBytes = std::int64_t{1} << 19;  // of b at a time: half of a second-level cache

// From one packed row of a to the next: an odd number of cache lines, or rows would fall on the same few sets
// of the first-level cache.
template <class T>
constexpr std::int64_t packed_row_stride(std::int64_t depth) {
  const std::int64_t lines = (units_of<UnitOf<T>>(depth) + kLanes - 1) / kLanes;
  return (lines | 1) * kLanes;
}
// From the rows of one tile to those of the next. pack_tiles writes past the last unit.
template <class T>
constexpr std::int64_t packed_tile_stride(std::int64_t depth) {
  return kTileRows * packed_row_stride<T>(depth) + kLanes;
}

// Sizes of the two workspaces of multiply_packed, in units. Rows come in whole blocks.
template <class T>
constexpr std::int64_t packed_rows_size(std::int64_t rows, std::int64_t depth) {
  return (rows + kBlockRows - 1) / kBlockRows * (kBlockRows / kTileRows) * packed_tile_stride<T>(depth);
}
template <class T>
constexpr std::int64_t packed_columns_size(std::int64_t depth, std::int64_t columns) {
  return units_of<UnitOf<T>>(depth) * ((columns + kLanes - 1) / kLanes * kLanes);
}

// Columns of b whose packed form takes at most `bytes`, in whole panels; at least one.
template <class T>
constexpr std::int64_t columns_of_bytes(std::int64_t bytes, std::int64_t depth) {
  const std::int64_t panel_bytes = std::max<std::int64_t>(1, units_of<UnitOf<T>>(depth)) * kPanelColumns * 4;
  return std::max<std::int64_t>(1, bytes / panel_bytes) * kPanelColumns;
}

struct Range {
  std::int64_t begin, end;
  std::int64_t size() const { return end - begin; }
};

template <class T>
inline const T* element(const Operand<T>& x, std::int64_t outer, std::int64_t k) {
  return x.data + (x.depth_major ? k * x.stride + outer : outer * x.stride + k);
}

// Rows of memory of a depth-major operand, of which a part that is narrower than a page is packed at a time. Few enough
// that their pages stay known, and the rest of their cache lines at hand, for the next part.
constexpr std::int64_t kDepthBlock = 64;

// Some of the depth, which begins at a whole unit, of one panel of columns.
template <class T>
inline void pack_panel(UnitOf<T>* panel, const Operand<T>& b, Range columns, Range depth) {
  const std::int64_t width = (columns.size() + kLanes - 1) / kLanes * kLanes;
  UnitOf<T>* out = panel + depth.begin / kPerUnit<UnitOf<T>> * width;
  const T* in = element(b, columns.begin, depth.begin);
  if (b.depth_major)
    pack_depth_major(out, width, in, b.stride, columns.size(), depth.size());
  else
    pack_transposed(out, width, in, b.stride, columns.size(), depth.size());
}

// Rows of memory are packed rows already where units are what lies there.
template <class T>
inline bool lie_as_units(const Operand<T>& x, std::int64_t depth) {
  constexpr std::int64_t kPer = kPerUnit<UnitOf<T>>;
  return kPer * sizeof(T) == sizeof(UnitOf<T>) && !x.depth_major && x.stride % kPer == 0 && depth % kPer == 0;
}

// The rows of a tile, of which element (m, u) is data[m * row_stride + u * depth_stride], and those of the next.
template <class T>
struct PackedRows {
  const UnitOf<T>* data;
  std::int64_t row_stride, depth_stride, tile_stride;
  const UnitOf<T>* tile(std::int64_t first_row) const { return data + first_row / kTileRows * tile_stride; }
};

// The eight units from row kTile * kTileRows on, of a block's.
template <int kTile, int... kLane>
inline void store_tile_units(std::uint32_t* out, const u32x16 (&rows)[3],
                             std::integer_sequence<int, kLane...>) {
  constexpr int kVector = kTile * kTileRows / kLanes, kFirst = kTile * kTileRows % kLanes;
  using u32x8 = std::uint32_t __attribute__((vector_size(32)));
  const u32x8 units =
      __builtin_shufflevector(rows[kVector], rows[std::min(kVector + 1, 2)], (kFirst + kLane)...);
  std::memcpy(out, &units, sizeof units);
}
template <int... kTile>
inline void store_block_units(std::uint32_t* out, std::int64_t tile_stride, const u32x16 (&rows)[3],
                              std::integer_sequence<int, kTile...>) {
  (store_tile_units<kTile>(out + kTile * tile_stride, rows, std::make_integer_sequence<int, 8>{}), ...);
}

// A block of depth-major rows: those of a tile side by side, unit after unit, so that a tile reads one stream. Eight
// are written where six are wanted; what is too much goes with the next unit.
//
//   in    r0 r1 ... r47   of depth 0        out    tile 0: [r0 .. r5 of unit 0][r0 .. r5 of unit 1] ...
//         r0 r1 ... r47   of depth 1               tile 1: [r6 .. r11 of unit 0] ...
template <class T>
inline void pack_tiles(UnitOf<T>* out, std::int64_t tile_stride, const T* in, std::int64_t stride,
                       std::int64_t count, std::int64_t depth) {
  static_assert(kBlockRows == 3 * kLanes && kBlockRows == 8 * kTileRows);
  auto* bits = reinterpret_cast<std::uint32_t*>(out);
  for_depth_units(in, stride, depth, [&](std::int64_t u, const T* first, bool has_second) {
    u32x16 rows[3];
    for (int v = 0; v < 3; ++v) {
      const T* from = first + v * kLanes;
      const std::int64_t left = count - v * kLanes;
      rows[v] = left >= kLanes ? load_depth_units(from, stride, has_second, AllLanes{})
                : left > 0     ? load_depth_units(from, stride, has_second, FirstLanes{left})
                               : u32x16{};
    }
    store_block_units(bits + u * kTileRows, tile_stride, rows, std::make_integer_sequence<int, 8>{});
  });
}

// `workspace` has packed_rows_size(rows.size(), depth). What is returned lies there, or is the rows themselves: a copy
// waits for memory, products with rows hardly do.
template <class T>
inline PackedRows<T> pack_row_blocks(UnitOf<T>* workspace, const Operand<T>& a, Range rows,
                                     std::int64_t depth) {
  const std::int64_t tile_stride = packed_tile_stride<T>(depth), row_stride = packed_row_stride<T>(depth);
  if (lie_as_units(a, depth)) {
    const std::int64_t stride = a.stride / kPerUnit<UnitOf<T>>;
    return {reinterpret_cast<const UnitOf<T>*>(element(a, rows.begin, 0)), stride, 1, kTileRows * stride};
  }
  if (!a.depth_major) {
    for (std::int64_t m = 0; m < rows.size(); m += kTileRows)
      pack_rows(workspace + m / kTileRows * tile_stride, row_stride, element(a, rows.begin + m, 0), a.stride,
                std::min(kTileRows, rows.size() - m), depth);
    return {workspace, row_stride, 1, tile_stride};
  }
  for (std::int64_t k = 0; k < depth; k += kDepthBlock) {
    UnitOf<T>* out = workspace + k / kPerUnit<UnitOf<T>> * kTileRows;
    for (std::int64_t m = 0; m < rows.size(); m += kBlockRows)
      pack_tiles(out + m / kTileRows * tile_stride, tile_stride, element(a, rows.begin + m, k), a.stride,
                 std::min(kBlockRows, rows.size() - m), std::min(kDepthBlock, depth - k));
  }
  return {workspace, 1, kTileRows, tile_stride};
}

}  // namespace upmoe::cpu
