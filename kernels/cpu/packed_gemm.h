#pragma once
// Matrix products on packed blocks, in registers: what grouped_gemm runs per expert, and what gemm runs of bf16 pairs
// and where oneDNN has no code for the processor (packed_product.cpp, which goes another way over the blocks). fp32, or
// bf16 with fp32 sums, whatever instructions there are.
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
//   with all the   6    | of c      |           |        Rows are packed where they do not lie in memory as units
//   depth          ...  |           |           |        of the products already (packed_operands.h).

#include <algorithm>
#include <array>
#include <bit>
#include <utility>

#include "kernels/core/tensor.h"
#include "kernels/cpu/packed_operands.h"

namespace upmoe::cpu {

// c[m, n] (+)= sum over k < depth of a(m, k) b(k, n) [+ bias[n]]; rows of c lie one behind the other. Or, turned,
// c[n, m] and bias[m]: the same sums to the bit with the factors' places changed, for few tokens times a weight. What
// is packed as panels takes longer to pack than rows do, so it should be what there is less of.
template <class T, class Out>
struct PackedProduct {
  Out* c;
  Operand<T> a, b;
  std::int64_t rows, columns, depth;
  Accumulate mode;
  const T* bias = nullptr;
  bool turned = false;

  PackedProduct as_turned() const { return {c, b, a, columns, rows, depth, mode, bias, !turned}; }
};

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

// The sums of a block of rows and a panel, as c's rows where it is turned: 16 x 16 of them at a time.
template <class T, class Out>
inline void store_turned(const PackedProduct<T, Out>& p, Range rows, Range columns, const float* sums,
                         std::int64_t sums_stride) {
  for (std::int64_t m = 0; m < rows.size(); m += kLanes) {
    const auto store_row = [&](std::int64_t n, u32x16 bits, auto lanes) {
      Out* c = p.c + (columns.begin + n) * p.rows + rows.begin + m;
      f32x16 sum = std::bit_cast<f32x16>(bits);
      if (p.bias != nullptr) sum += load(p.bias + rows.begin + m, lanes);
      store(c, p.mode == Accumulate::kAdd ? load(c, lanes) + sum : sum, lanes);
    };
    for (std::int64_t n = 0; n < columns.size(); n += kLanes) {
      u32x16 row[kLanes];
      for (std::int64_t i = 0; i < kLanes; ++i)
        row[i] =
            m + i < rows.size() ? std::bit_cast<u32x16>(load(sums + (m + i) * sums_stride + n)) : u32x16{};
      transpose(row);
      const std::int64_t count = std::min(kLanes, columns.size() - n);
      for (std::int64_t i = 0; i < count; ++i)
        rows.size() - m >= kLanes ? store_row(n + i, row[i], AllLanes{})
                                  : store_row(n + i, row[i], FirstLanes{rows.size() - m});
    }
  }
}

// Packed rows times one packed panel, tile by tile.
template <class T, class Out>
class PanelProduct {
 public:
  PanelProduct(const PackedProduct<T, Out>& p, const PackedRows<T>& a, Range columns, const UnitOf<T>* panel)
      : p_(p), a_(a), columns_(columns), panel_(panel), vectors_((columns.size() + kLanes - 1) / kLanes) {}

  void store(Range rows) const {
    for (std::int64_t m = 0; m < rows.size(); m += kTileRows) {
      alignas(64) float sums[kTileRows * kPanelColumns];
      const std::int64_t tile_rows = std::min(kTileRows, rows.size() - m);
      Out* c = p_.c + (rows.begin + m) * p_.columns + columns_.begin;
      prefetch_tile(c, p_.columns, tile_rows, columns_.size());
      multiply(m, tile_rows, sums);
      if (p_.bias != nullptr) add_bias(sums, stride(), p_.bias + columns_.begin, tile_rows, columns_.size());
      store_tile(c, p_.columns, sums, stride(), tile_rows, columns_.size(), p_.mode);
    }
  }
  void store_as_columns(Range rows) const {
    for (std::int64_t m = 0; m < rows.size(); m += kBlockRows) {
      alignas(64) float sums[kBlockRows * kPanelColumns];
      const Range block{rows.begin + m, std::min(rows.begin + m + kBlockRows, rows.end)};
      prefetch_tile(p_.c + columns_.begin * p_.rows + block.begin, p_.rows, columns_.size(), block.size());
      for (std::int64_t i = 0; i < block.size(); i += kTileRows)
        multiply(m + i, std::min(kTileRows, block.size() - i), sums + i * stride());
      store_turned(p_, block, columns_, sums, stride());
    }
  }

 private:
  std::int64_t stride() const { return vectors_ * kLanes; }
  void multiply(std::int64_t m, std::int64_t tile_rows, float* sums) const {
    tile_for<UnitOf<T>>(tile_rows, vectors_)(sums, a_.tile(m), a_.row_stride, a_.depth_stride, panel_,
                                             units_of<UnitOf<T>>(p_.depth));
  }

  const PackedProduct<T, Out>& p_;
  const PackedRows<T>& a_;
  Range columns_;
  const UnitOf<T>* panel_;
  std::int64_t vectors_;
};

template <class T, class Out>
inline void multiply_panel(const PackedProduct<T, Out>& p, Range rows, Range columns, const PackedRows<T>& a,
                           const UnitOf<T>* panel) {
  const PanelProduct<T, Out> product(p, a, columns, panel);
  p.turned ? product.store_as_columns(rows) : product.store(rows);
}

// body(columns of one panel, its units of the packed columns) for all that begin in `columns`.
template <class T, class Body>
inline void for_panels(UnitOf<T>* packed, Range columns, std::int64_t depth, Body&& body) {
  for (std::int64_t n = columns.begin; n < columns.end; n += kPanelColumns)
    body(Range{n, std::min(n + kPanelColumns, columns.end)},
         packed + (n - columns.begin) * units_of<UnitOf<T>>(depth));
}

template <class T>
struct PackWorkspace {
  UnitOf<T>* rows;     // packed_rows_size(kBlockRows, depth)
  UnitOf<T>* columns;  // packed_columns_size(depth, columns of the rectangle)
};

// Packs the columns during the first block of rows; the later blocks use them again.
template <class T, class Out>
inline void multiply_packed(const PackedProduct<T, Out>& p, Range rows, Range columns,
                            PackWorkspace<T> work) {
  for (std::int64_t m = rows.begin; m < rows.end; m += kBlockRows) {
    const Range block{m, std::min(m + kBlockRows, rows.end)};
    const PackedRows<T> a = pack_row_blocks(work.rows, p.a, block, p.depth);
    for_panels<T>(work.columns, columns, p.depth, [&](Range panel_columns, UnitOf<T>* panel) {
      if (m == rows.begin) pack_panel(panel, p.b, panel_columns, {0, p.depth});
      multiply_panel(p, block, panel_columns, a, panel);
    });
  }
}

}  // namespace upmoe::cpu
