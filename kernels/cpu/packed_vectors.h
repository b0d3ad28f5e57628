#pragma once
// Products on packed blocks (packed_gemm.h) by vectors: fp32, or bf16 with fp32 sums, whatever instructions there are.
// A tile is 6 rows by 4 vectors of columns. The innermost loop goes along the depth: a unit of each row of a, a row of
// a panel of b, and the sums in registers, which are a tile of c when it ends.
//
// The first factor is packed here: rows one behind the other, or those of a tile side by side.

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "kernels/cpu/packed_operands.h"

namespace upmoe::cpu {

constexpr std::int64_t kTileRows = 6;               // 6 x 4 vectors of sums fill 24 of 32 registers
constexpr std::int64_t kBlockRows = 8 * kTileRows;  // rows of a that are packed together

// From one packed row of a to the next: an odd number of cache lines, or rows would fall on the same few sets
// of the first-level cache.
template <class T>
constexpr std::int64_t packed_row_stride(std::int64_t depth) {
  return (parts_of_size(units_of<UnitOf<T>>(depth), kLanes) | 1) * kLanes;
}
// From the rows of one tile to those of the next. pack_tiles writes past the last unit.
template <class T>
constexpr std::int64_t packed_tile_stride(std::int64_t depth) {
  return kTileRows * packed_row_stride<T>(depth) + kLanes;
}

// --- the first factor ---

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

// `workspace` has InVectors::rows_size(rows.size(), depth). What is returned lies there, or is the rows themselves: a
// copy waits for memory, products with rows hardly do.
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

// --- the product of one tile ---

// kRegisters registers of columns, of panels and sums that are kVectors vectors wide.
template <class Unit, int kRows, int kRegisters, int kVectors>
[[gnu::always_inline]] inline void multiply_columns(float* sums, const Unit* a, std::int64_t row_stride,
                                                    std::int64_t depth_stride, const Unit* b,
                                                    std::int64_t units) {
  Register sum[kRows][kRegisters] = {};
  for (std::int64_t u = 0; u < units; ++u, a += depth_stride, b += kVectors * kLanes) {
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 16
      for (int r = 0; r < kRegisters; ++r)
        sum[m][r] = multiply_add(sum[m][r], load_unit(a + m * row_stride),
                                 load_unit_register(b + r * kRegisterLanes));
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 16
    for (int r = 0; r < kRegisters; ++r)
      store_register(sums + m * kVectors * kLanes + r * kRegisterLanes, sum[m][r]);
}

// sum[kRows][kVectors * 16] of packed a, whose element (m, u) is a[m * row_stride + u * depth_stride], and a
// panel of b.
template <class Unit, int kRows, int kVectors>
[[gnu::noinline]] void multiply_tile(float* sums, const Unit* a, std::int64_t row_stride,
                                     std::int64_t depth_stride, const Unit* b, std::int64_t units) {
  constexpr int kAtOnce = std::min(kVectors, kVectorsAtOnce);
  static_assert(kVectors % kAtOnce == 0);
  for (int v = 0; v < kVectors; v += kAtOnce)
    multiply_columns<Unit, kRows, kAtOnce * kLanes / kRegisterLanes, kVectors>(
        sums + v * kLanes, a, row_stride, depth_stride, b + v * kLanes, units);
}

template <class Unit>
using MultiplyTile = void (*)(float*, const Unit*, std::int64_t, std::int64_t, const Unit*, std::int64_t);

constexpr int kVectorCounts = static_cast<int>(kPanelColumns / kLanes);

template <class Unit, int... kIndex>
constexpr auto tile_table(std::integer_sequence<int, kIndex...>) {
  return std::array<MultiplyTile<Unit>, sizeof...(kIndex)>{
      multiply_tile<Unit, kIndex / kVectorCounts + 1, kIndex % kVectorCounts + 1>...};
}

// The tile for these rows (1 to 6) and vectors (1 to 4).
template <class Unit>
inline MultiplyTile<Unit> tile_for(std::int64_t rows, std::int64_t vectors) {
  static constexpr auto kTable =
      tile_table<Unit>(std::make_integer_sequence<int, kTileRows * kVectorCounts>{});
  return kTable[static_cast<std::size_t>((rows - 1) * kVectorCounts + vectors - 1)];
}

// What packed_gemm.h takes as Form.
template <class T>
struct InVectors {
  using Element = T;
  using Unit = UnitOf<T>;
  using Rows = PackedRows<T>;
  struct Use {};  // nothing to be had or given back

  static constexpr std::int64_t kTileRows = cpu::kTileRows, kBlockRows = cpu::kBlockRows;
  static constexpr std::int64_t kStoredRows = kBlockRows;  // whole vectors of turned rows
  static constexpr std::int64_t kUnitsAtOnce = 1;
  // Of a task: so many that packing the columns for each costs little. And of a dense product's, of any depth.
  static constexpr std::int64_t kTaskRows = 10 * kBlockRows, kDenseRows = 2 * kBlockRows;
  static constexpr std::int64_t most_dense_rows(std::int64_t) { return kDenseRows; }
  static constexpr std::int64_t kPackedBytes = 1 << 19;  // of b at a time: half of a second-level cache

  // What is packed as panels by all threads goes through the last-level cache, or is transposed on top: it should be
  // the smaller factor. A shallow product loses more by the turned store, and so do those of experts.
  template <class Out>
  static bool is_better_turned(const PackedProduct<T, Out>&) {
    return false;
  }
  template <class Out>
  static bool is_better_turned_when_dense(const PackedProduct<T, Out>& p) {
    if (p.depth < 1024) return false;
    return p.b.depth_major ? p.a.depth_major && 4 * p.rows <= p.columns
                           : p.rows <= 8 * kPanelColumns && p.rows < p.columns;
  }

  // Of the workspace for these rows, in units. They come in whole blocks.
  static constexpr std::int64_t rows_size(std::int64_t rows, std::int64_t depth) {
    return parts_of_size(rows, kBlockRows) * (kBlockRows / kTileRows) * packed_tile_stride<T>(depth);
  }
  static Rows pack(Unit* workspace, const Operand<T>& a, Range rows, std::int64_t depth, std::int64_t) {
    return pack_row_blocks(workspace, a, rows, depth);
  }
  // A part of the depth, from a whole unit on: all columns of a unit, then those of the next.
  static void pack_panel(Unit* panel, const Operand<T>& b, Range columns, Range part, std::int64_t) {
    const std::int64_t width = parts_of_size(columns.size(), kLanes) * kLanes;
    pack_columns(panel + part.begin / kPerUnit<Unit> * width, rows_of(width), b, columns, part);
  }
  // `rows` of those packed, at most a tile, times a panel: sums[rows][vectors * kLanes].
  static void multiply(float* sums, const Rows& a, Range rows, const Unit* panel, std::int64_t vectors,
                       std::int64_t depth) {
    tile_for<Unit>(rows.size(), vectors)(sums, a.tile(rows.begin), a.row_stride, a.depth_stride, panel,
                                         units_of<Unit>(depth));
  }
};

}  // namespace upmoe::cpu
