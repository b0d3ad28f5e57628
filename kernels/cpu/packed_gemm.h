#pragma once
// Matrix products on packed blocks, in registers: what grouped_gemm runs per expert, and gemm where oneDNN
// has no code for the processor. fp32, or bf16 with fp32 sums, whatever instructions there are.
//
// For experts an own loop rather than oneDNN, because the number of rows per expert is another one in every
// step, and a oneDNN primitive is compiled for one number of rows, in 0.2 to 0.6 ms: as long as the product
// itself. And because here every element of the result is one sum over the depth in ascending order, kept in
// one register: it depends on its own row and column alone, not on the other rows, on how the work is cut
// into tasks, or on the number of threads.
//
// A task computes a rectangle of c, a block of 48 rows at a time:
//
//                        b, packed once for the rectangle: panels of 64 columns, with all of the depth, as many
//                        of them as fill half of the second-level cache
//                       +-----------+-----------+---
//                       |   panel   |   panel   |        The innermost loop goes along the depth: one element of
//                       |           |           |        each of 6 rows of a, 64 of the panel, 6 x 64 sums in
//                       +===========+===========+===     registers, which are a tile of c when it ends.
//   a: 48 rows,    6    | 6 x 64    |           |
//   packed, with   6    | of c      |           |
//   all the depth  ...  |           |           |

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <utility>

#include "kernels/core/tensor.h"
#include "kernels/cpu/units.h"

namespace upmoe::cpu {

// a(m, k) or b(k, n) with "outer" index m or n: data[outer * stride + k], or data[k * stride + outer] if depth_major.
template <class T>
struct Operand {
  const T* data;
  std::int64_t stride;
  bool depth_major;
};

// c[m, n] (+)= sum over k < depth of a(m, k) b(k, n) [+ bias[n]]; rows of c lie one behind the other.
template <class T, class Out>
struct PackedProduct {
  Out* c;
  Operand<T> a, b;
  std::int64_t rows, columns, depth;
  Accumulate mode;
  const T* bias = nullptr;  // [columns], or none
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

// Sizes of the two workspaces of multiply_packed, in units.
template <class T>
constexpr std::int64_t packed_rows_size(std::int64_t depth) {
  return kBlockRows * packed_row_stride<T>(depth);
}
template <class T>
constexpr std::int64_t packed_columns_size(std::int64_t depth, std::int64_t columns) {
  return units_of<UnitOf<T>>(depth) * ((columns + kLanes - 1) / kLanes * kLanes);
}

// Columns of b whose packed form fits the cache, in whole panels.
template <class T>
constexpr std::int64_t columns_in_cache(std::int64_t depth) {
  const std::int64_t panel_bytes = std::max<std::int64_t>(1, units_of<UnitOf<T>>(depth)) * kPanelColumns * 4;
  return std::max<std::int64_t>(1, kPackedBytes / panel_bytes) * kPanelColumns;
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
        sum[m][r] = multiply_add(sum[m][r], a[m * row_stride], load_unit_register(b + r * kRegisterLanes));
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

// Asks for the cache lines of a tile of c while its sums are made.
template <class Out>
inline void prefetch_tile(const Out* c, std::int64_t c_stride, std::int64_t rows, std::int64_t columns) {
  constexpr std::int64_t kLine = 64 / static_cast<std::int64_t>(sizeof(Out));
  for (std::int64_t m = 0; m < rows; ++m, c += c_stride)
    for (std::int64_t n = 0; n < columns; n += kLine) __builtin_prefetch(c + n, 1);
}

// To every row of a tile.
template <class T>
inline void add_bias(float* sums, std::int64_t sums_stride, const T* bias, std::int64_t rows,
                     std::int64_t columns) {
  for (std::int64_t m = 0; m < rows; ++m, sums += sums_stride)
    for_lanes(columns,
              [&](std::int64_t n, auto lanes) { store(sums + n, load(sums + n) + load(bias + n, lanes)); });
}

// Rounds once, after adding what is there.
template <class Out>
inline void store_tile(Out* c, std::int64_t c_stride, const float* sums, std::int64_t sums_stride,
                       std::int64_t rows, std::int64_t columns, Accumulate mode) {
  for (std::int64_t m = 0; m < rows; ++m, c += c_stride, sums += sums_stride)
    for_lanes(columns, [&](std::int64_t n, auto lanes) {
      const f32x16 sum = load(sums + n);
      store(c + n, mode == Accumulate::kAdd ? load(c + n, lanes) + sum : sum, lanes);
    });
}

struct Range {
  std::int64_t begin, end;
  std::int64_t size() const { return end - begin; }
};

template <class T>
struct PackWorkspace {
  UnitOf<T>* rows;     // packed_rows_size(depth)
  UnitOf<T>* columns;  // packed_columns_size(depth, columns of the rectangle)
};

template <class T>
inline const T* outer_begin(const Operand<T>& x, std::int64_t outer) {
  return x.data + (x.depth_major ? outer : outer * x.stride);
}

template <class T>
inline void pack_panel(UnitOf<T>* out, const Operand<T>& b, Range columns, std::int64_t depth) {
  const std::int64_t width = (columns.size() + kLanes - 1) / kLanes * kLanes;
  if (b.depth_major)
    pack_depth_major(out, width, outer_begin(b, columns.begin), b.stride, columns.size(), depth);
  else
    pack_transposed(out, width, outer_begin(b, columns.begin), b.stride, columns.size(), depth);
}

// --- a rectangle of c ---

// One block of packed rows times one packed panel.
template <class T, class Out>
inline void multiply_panel(const PackedProduct<T, Out>& p, Range rows, Range columns,
                           const UnitOf<T>* packed_rows, const UnitOf<T>* panel) {
  const std::int64_t row_stride = p.a.depth_major ? 1 : packed_row_stride<T>(p.depth);
  const std::int64_t depth_stride = p.a.depth_major ? kBlockRows : 1;
  const std::int64_t vectors = (columns.size() + kLanes - 1) / kLanes;
  for (std::int64_t m = 0; m < rows.size(); m += kTileRows) {
    alignas(64) float sums[kTileRows * kPanelColumns];
    const std::int64_t tile_rows = std::min(kTileRows, rows.size() - m);
    Out* c = p.c + (rows.begin + m) * p.columns + columns.begin;
    prefetch_tile(c, p.columns, tile_rows, columns.size());
    tile_for<UnitOf<T>>(tile_rows, vectors)(sums, packed_rows + m * row_stride, row_stride, depth_stride,
                                            panel, units_of<UnitOf<T>>(p.depth));
    if (p.bias != nullptr)
      add_bias(sums, vectors * kLanes, p.bias + columns.begin, tile_rows, columns.size());
    store_tile(c, p.columns, sums, vectors * kLanes, tile_rows, columns.size(), p.mode);
  }
}

// Packs the columns during the first block of rows; the later blocks use them again.
template <class T, class Out>
inline void multiply_packed(const PackedProduct<T, Out>& p, Range rows, Range columns,
                            PackWorkspace<T> work) {
  for (std::int64_t m = rows.begin; m < rows.end; m += kBlockRows) {
    const Range block{m, std::min(m + kBlockRows, rows.end)};
    const T* a = outer_begin(p.a, m);
    if (p.a.depth_major)
      pack_depth_major(work.rows, kBlockRows, a, p.a.stride, block.size(), p.depth);
    else
      pack_rows(work.rows, packed_row_stride<T>(p.depth), a, p.a.stride, block.size(), p.depth);
    for (std::int64_t n = columns.begin; n < columns.end; n += kPanelColumns) {
      const Range panel_columns{n, std::min(n + kPanelColumns, columns.end)};
      UnitOf<T>* panel = work.columns + (n - columns.begin) * units_of<UnitOf<T>>(p.depth);
      if (m == rows.begin) pack_panel(panel, p.b, panel_columns, p.depth);
      multiply_panel(p, block, panel_columns, work.rows, panel);
    }
  }
}

}  // namespace upmoe::cpu
