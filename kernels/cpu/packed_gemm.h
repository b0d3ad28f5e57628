#pragma once
// Matrix products on packed blocks: what grouped_gemm runs per expert, and what gemm runs of bf16 pairs and where
// oneDNN has no code for the processor (packed_product.cpp, which goes another way over the blocks).
//
// For experts an own loop rather than oneDNN, because the number of rows per expert is another one in every
// step, and a oneDNN primitive is compiled for one number of rows, in 0.2 to 0.6 ms: as long as the product
// itself. And because here every element of the result is one sum over the depth in one order, kept in
// registers: it depends on its own row and column alone, not on the other rows, on how the work is cut
// into tasks, or on the number of threads.
//
// A task computes a rectangle of c, a block of rows at a time:
//
//                        b, packed once for the rectangle: panels of 64 columns, with all of the depth, as many
//                        of them as fill a part of the second-level cache
//                       +-----------+-----------+---
//                       |   panel   |   panel   |        How the rows of a are packed, and a tile of them multiplied
//                       |           |           |        with a panel, is the Form's:
//                       +===========+===========+===
//   a: block,           | tile of c |           |          InVectors<T>            packed_vectors.h
//   with all the        | next tile |           |          InMatrices<Registers>   packed_matrices.h
//   depth               |           |           |
//
// A Form has Element, the Unit of its packed factors (units.h) and Rows, a packed block of a; Use, which a thread holds
// while it multiplies; pack(), pack_panel(), multiply() and how large their blocks are.

#include <algorithm>
#include <bit>
#include <utility>

#include "kernels/core/tensor.h"
#include "kernels/cpu/packed_operands.h"

namespace upmoe::cpu {

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
template <class Form, class Out>
class PanelProduct {
 public:
  using Product = PackedProduct<typename Form::Element, Out>;
  PanelProduct(const Product& p, const typename Form::Rows& a, Range columns,
               const typename Form::Unit* panel)
      : p_(p), a_(a), columns_(columns), panel_(panel), vectors_(parts_of_size(columns.size(), kLanes)) {}

  void store(Range rows) const {
    for (std::int64_t m = 0; m < rows.size(); m += Form::kTileRows) {
      alignas(64) float sums[Form::kTileRows * kPanelColumns];
      const Range tile{m, std::min(m + Form::kTileRows, rows.size())};
      Out* c = p_.c + (rows.begin + m) * p_.columns + columns_.begin;
      prefetch_tile(c, p_.columns, tile.size(), columns_.size());
      multiply(tile, sums);
      if (p_.bias != nullptr)
        add_bias(sums, stride(), p_.bias + columns_.begin, tile.size(), columns_.size());
      store_tile(c, p_.columns, sums, stride(), tile.size(), columns_.size(), p_.mode);
    }
  }
  void store_as_columns(Range rows) const {
    for (std::int64_t m = 0; m < rows.size(); m += Form::kStoredRows) {
      alignas(64) float sums[Form::kStoredRows * kPanelColumns];
      const Range block{rows.begin + m, std::min(rows.begin + m + Form::kStoredRows, rows.end)};
      prefetch_tile(p_.c + columns_.begin * p_.rows + block.begin, p_.rows, columns_.size(), block.size());
      for (std::int64_t i = 0; i < block.size(); i += Form::kTileRows)
        multiply({m + i, m + std::min(i + Form::kTileRows, block.size())}, sums + i * stride());
      store_turned(p_, block, columns_, sums, stride());
    }
  }

 private:
  std::int64_t stride() const { return vectors_ * kLanes; }
  void multiply(Range tile, float* sums) const { Form::multiply(sums, a_, tile, panel_, vectors_, p_.depth); }

  const Product& p_;
  const typename Form::Rows& a_;
  Range columns_;
  const typename Form::Unit* panel_;
  std::int64_t vectors_;
};

template <class Form, class Out>
inline void multiply_panel(const PackedProduct<typename Form::Element, Out>& p, Range rows, Range columns,
                           const typename Form::Rows& a, const typename Form::Unit* panel) {
  const PanelProduct<Form, Out> product(p, a, columns, panel);
  p.turned ? product.store_as_columns(rows) : product.store(rows);
}

// body(columns of one panel, its units of the packed columns) for all that begin in `columns`.
template <class Form, class Body>
inline void for_panels(typename Form::Unit* packed, Range columns, std::int64_t depth, Body&& body) {
  for (std::int64_t n = columns.begin; n < columns.end; n += kPanelColumns)
    body(Range{n, std::min(n + kPanelColumns, columns.end)},
         packed + (n - columns.begin) * panel_units<Form>(depth));
}

template <class Form>
struct PackWorkspace {
  typename Form::Unit* rows;     // Form::rows_size(kBlockRows, depth)
  typename Form::Unit* columns;  // packed_columns_size(depth, columns of the rectangle)
};

// A block of the depth of all these columns. Rows of memory are read as far as they go, not a panel's part of each.
template <class Form, class T>
inline void pack_depth_block(typename Form::Unit* packed, const Operand<T>& b, Range columns, Range part,
                             std::int64_t depth) {
  static_assert(kDepthBlock % (Form::kUnitsAtOnce * kPerUnit<typename Form::Unit>) == 0);
  for_panels<Form>(packed, columns, depth, [&](Range of, typename Form::Unit* panel) {
    Form::pack_panel(panel, b, of, part, depth);
  });
}

// Packs depth-major columns before the first block of rows, others during it, a panel when it is needed; the later
// blocks use them again.
template <class Form, class Out>
inline void multiply_packed(const PackedProduct<typename Form::Element, Out>& p, Range rows, Range columns,
                            PackWorkspace<Form> work) {
  [[maybe_unused]] const typename Form::Use use{};
  if (p.b.depth_major)
    for (std::int64_t k = 0; k < p.depth; k += kDepthBlock)
      pack_depth_block<Form>(work.columns, p.b, columns, {k, std::min(k + kDepthBlock, p.depth)}, p.depth);
  for (std::int64_t m = rows.begin; m < rows.end; m += Form::kBlockRows) {
    const Range block{m, std::min(m + Form::kBlockRows, rows.end)};
    const typename Form::Rows a = Form::pack(work.rows, p.a, block, p.depth, columns.size());
    for_panels<Form>(work.columns, columns, p.depth, [&](Range of, typename Form::Unit* panel) {
      if (m == rows.begin && !p.b.depth_major) Form::pack_panel(panel, p.b, of, {0, p.depth}, p.depth);
      multiply_panel<Form>(p, block, of, a, panel);
    });
  }
}

}  // namespace upmoe::cpu
