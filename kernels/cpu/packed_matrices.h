#pragma once
// Products on packed blocks (packed_gemm.h) of bf16 in matrix registers. What one register takes lies in one piece of
// memory, 16 rows or columns by 16 pairs of depth, and the next of the depth behind it: it is the second-level cache
// that feeds the registers, and faster so than from rows that stand apart.
//
//   rows or columns 0-15    [pairs 0-15][pairs 16-31] ...
//   rows or columns 16-31   [pairs 0-15][pairs 16-31] ...
//
// Of a depth that ends within 16 pairs the rest is zero, in both factors.

#include <algorithm>
#include <cstring>

#include "kernels/cpu/matrix_product.h"
#include "kernels/cpu/packed_operands.h"

namespace upmoe::cpu {

// Rows of a block, packed or where they lie.
struct MatrixRows {
  MatrixFactor first;
  MatrixFactor tile(std::int64_t first_row) const {
    MatrixFactor factor = first;
    factor.data += first_row / kMatrixRows * first.tile_stride;
    return factor;
  }
};

// Of rows whose depth is contiguous: `count` of 16, all of the depth.
template <class T>
inline void pack_matrix_rows(std::uint32_t* out, const T* in, std::int64_t stride, std::int64_t count,
                             std::int64_t depth) {
  constexpr std::int64_t kDepth = 2 * kMatrixRows, kAtOnce = 8;  // pieces of a row at once
  const std::int64_t whole = depth / kDepth;
  for (std::int64_t from = 0; from < whole; from += kAtOnce) {
    const std::int64_t to = std::min(whole, from + kAtOnce);
    for (std::int64_t m = 0; m < count; ++m)
      for (std::int64_t i = from; i < to; ++i)
        std::memcpy(out + i * kMatrixUnits + m * kMatrixRows, in + m * stride + i * kDepth,
                    kDepth * sizeof(T));
  }
  if (whole * kDepth == depth) return;
  for (std::int64_t m = 0; m < count; ++m) {
    const u32x16 units = load_units(in + m * stride + whole * kDepth, depth - whole * kDepth);
    std::memcpy(out + whole * kMatrixUnits + m * kMatrixRows, &units, sizeof units);
  }
}

// Of depth-major rows: `count` of 16, up to 32 of the depth, transposed in registers.
template <class T>
inline void pack_matrix_columns(std::uint32_t* out, const T* in, std::int64_t stride, std::int64_t count,
                                std::int64_t depth) {
  u32x16 rows[kMatrixRows] = {};
  for_depth_units(in, stride, depth, [&](std::int64_t u, const T* first, bool has_second) {
    rows[u] = count >= kLanes ? load_depth_units(first, stride, has_second, AllLanes{})
                              : load_depth_units(first, stride, has_second, FirstLanes{count});
  });
  transpose(rows);
  std::memcpy(out, rows, sizeof rows);
}

// What packed_gemm.h takes as Form.
template <class Registers>
struct InMatrices {
  using Element = bf16;
  using Unit = std::uint32_t;
  using Rows = MatrixRows;
  using Use = typename Registers::Use;

  static constexpr std::int64_t kTileRows = 2 * kMatrixRows, kStoredRows = kTileRows;
  static constexpr std::int64_t kUnitsAtOnce = kMatrixRows;
  static constexpr std::int64_t kBlockRows = 4 * kTileRows, kTaskRows = 16 * kBlockRows;
  static constexpr std::int64_t kDenseRows = kBlockRows;
  static constexpr std::int64_t kPackedBytes = 1 << 20;  // of b at a time: half of a second-level cache
  // Of a dense product, whose b comes from the last-level cache once for all of them: as many as the other half keeps.
  static constexpr std::int64_t most_dense_rows(std::int64_t depth) {
    const std::int64_t block_bytes = kDenseRows * panel_units<InMatrices>(depth) * 4;
    return std::clamp<std::int64_t>(kPackedBytes / std::max<std::int64_t>(1, block_bytes), 1, 4) * kDenseRows;
  }

  // To transpose costs as much as to multiply with some hundred rows: of two factors that lie along the depth the
  // smaller one is packed as panels. A shallow product loses more by the turned store.
  template <class Out>
  static bool is_better_turned(const PackedProduct<bf16, Out>& p) {
    return !p.a.depth_major && !p.b.depth_major && (p.depth < 512 ? 4 : 1) * p.rows < p.columns;
  }
  template <class Out>
  static bool is_better_turned_when_dense(const PackedProduct<bf16, Out>& p) {
    return is_better_turned(p);
  }

  static constexpr std::int64_t tile_stride(std::int64_t depth) {
    return kMatrixRows * panel_units<InMatrices>(depth);
  }
  static constexpr std::int64_t rows_size(std::int64_t rows, std::int64_t depth) {
    return parts_of_size(rows, kMatrixRows) * tile_stride(depth);
  }

  template <class T>
  static Rows pack(Unit* workspace, const Operand<T>& a, Range rows, std::int64_t depth,
                   std::int64_t columns) {
    const std::int64_t stride = tile_stride(depth), step = 2 * kMatrixRows;
    // Read once or twice, a copy would only wait for memory.
    if (columns <= kPanelColumns && lie_as_units(a, depth) && depth % step == 0 &&
        rows.size() % kMatrixRows == 0) {
      const std::int64_t units = a.stride / 2;
      return {{reinterpret_cast<const Unit*>(element(a, rows.begin, 0)), units, kMatrixRows,
               kMatrixRows * units}};
    }
    const auto tile = [&](std::int64_t m) { return workspace + m / kMatrixRows * stride; };
    const auto count = [&](std::int64_t m) { return std::min(kMatrixRows, rows.size() - m); };
    if (a.depth_major) {
      for (std::int64_t k = 0; k < depth; k += step)
        for (std::int64_t m = 0; m < rows.size(); m += kMatrixRows)
          pack_matrix_columns(tile(m) + k / step * kMatrixUnits, element(a, rows.begin + m, k), a.stride,
                              count(m), std::min(step, depth - k));
    } else {
      for (std::int64_t m = 0; m < rows.size(); m += kMatrixRows)
        pack_matrix_rows(tile(m), element(a, rows.begin + m, 0), a.stride, count(m), depth);
    }
    return {{workspace, kMatrixRows, kMatrixUnits, stride}};
  }

  // A part of the depth, from a whole number of registers on.
  template <class T>
  static void pack_panel(Unit* panel, const Operand<T>& b, Range columns, Range part, std::int64_t depth) {
    const std::int64_t stride = tile_stride(depth), units = units_of<Unit>(part.size());
    Unit* out = panel + part.begin / 2 * kMatrixRows;
    pack_columns(out, {kMatrixRows, stride}, b, columns, part);
    const std::int64_t end = panel_units<InMatrices>(part.size());
    for (std::int64_t n = 0; n < columns.size(); n += kMatrixRows, out += stride)
      std::fill(out + units * kMatrixRows, out + end * kMatrixRows, Unit{});
  }

  static void multiply(float* sums, const Rows& a, Range rows, const Unit* panel, std::int64_t vectors,
                       std::int64_t depth) {
    const std::int64_t stride = vectors * kLanes;
    const MatrixFactor columns{panel, kMatrixRows, kMatrixUnits, tile_stride(depth)};
    const MatrixProduct product{sums, stride, a.tile(rows.begin), columns,
                                panel_units<InMatrices>(depth) / kUnitsAtOnce};
    multiply_matrices<Registers, false>(product, rows.size(), stride);
  }
};

}  // namespace upmoe::cpu
