// A dense product on packed blocks. Both factors are packed once for many uses of them, which makes the difference to
// the products of experts (packed_products.h), that have few rows each:
//
//                   b, a chunk of columns at a time: packed by all threads together, into what the last-level cache
//                   keeps for them, then read by all of them
//                  +-----------------------+
//                  |                       |
//                  +=======+=======+=======+
//   a: 96 rows,    | tasks: 96 rows        |
//   packed by the  |  and a part of        |
//   thread that    |  the columns          |
//   takes them
//
// A depth of more than kDepthAtOnce is cut, and the sums of the parts are added in fp32, in order.

#include "kernels/cpu/dense_product.h"
#include "kernels/cpu/packed_products.h"

namespace upmoe::cpu {

namespace {

constexpr std::int64_t kRowsAtOnce = 2 * kBlockRows;
constexpr std::int64_t kChunkBytes = std::int64_t{1} << 22;
constexpr std::int64_t kDepthAtOnce = 4096;

template <class T>
std::int64_t chunk_columns(std::int64_t columns, std::int64_t depth) {
  const std::int64_t panel_bytes = units_of<UnitOf<T>>(depth) * kPanelColumns * 4;
  return std::min(std::max<std::int64_t>(1, kChunkBytes / panel_bytes),
                  parts_of_size(columns, kPanelColumns)) *
         kPanelColumns;
}

// Panels of a task: all of a chunk's, or fewer where there are few rows for many threads.
std::int64_t task_panels(std::int64_t row_parts, std::int64_t panels) {
  const std::int64_t column_parts = std::min(panels, parts_of_size(4 * worker_count(), row_parts));
  return worker_count() == 1 ? panels : parts_of_size(panels, column_parts);
}

template <class T>
Operand<T> from_depth(const Operand<T>& x, std::int64_t k) {
  return {x.data + (x.depth_major ? k * x.stride : k), x.stride, x.depth_major};
}

// Of a depth of at most kDepthAtOnce.
template <class T, class Out>
void multiply_in_chunks(Exec& ex, const PackedProduct<T, Out>& p) {
  static_assert(sizeof(UnitOf<T>) == sizeof(float));
  const std::int64_t chunk = chunk_columns<T>(p.columns, p.depth);
  const std::int64_t rows_size = packed_rows_size<T>(kRowsAtOnce, p.depth);
  ScratchScope scope(*ex.scratch);
  const auto take = [&](std::int64_t units, std::string_view name) {
    return reinterpret_cast<UnitOf<T>*>(ex.scratch->take({units}, DType::kF32, name).data);
  };
  UnitOf<T>* packed = take(packed_columns_size<T>(p.depth, chunk), "packed columns");
  UnitOf<T>* packed_rows = take(worker_count() * rows_size, "packed rows");
  const std::int64_t row_parts = parts_of_size(p.rows, kRowsAtOnce);
  for (std::int64_t first = 0; first < p.columns; first += chunk) {
    const Range columns{first, std::min(first + chunk, p.columns)};
    const std::int64_t panels = parts_of_size(columns.size(), kPanelColumns);
    const auto panels_of = [&](std::int64_t begin, std::int64_t end) {
      return Range{first + begin * kPanelColumns, std::min(first + end * kPanelColumns, columns.end)};
    };
    const auto place = [&](std::int64_t panel) {
      return packed + panel * kPanelColumns * units_of<UnitOf<T>>(p.depth);
    };
    parallel_for(panels, kPanelColumns * p.depth,
                 [&](std::int64_t i) { pack_panel(place(i), p.b, panels_of(i, i + 1), p.depth); });
    const std::int64_t at_once = task_panels(row_parts, panels),
                       column_parts = parts_of_size(panels, at_once);
    parallel_tasks(row_parts * column_parts, [&](std::int64_t task, std::int64_t worker) {
      const std::int64_t row = task / column_parts * kRowsAtOnce, panel = task % column_parts * at_once;
      const Range rows{row, std::min(row + kRowsAtOnce, p.rows)};
      const PackedRows<T> a = pack_row_blocks(packed_rows + worker * rows_size, p.a, rows, p.depth);
      for_panels<T>(place(panel), panels_of(panel, panel + at_once), p.depth,
                    [&](Range of, const UnitOf<T>* b) { multiply_panel(p, rows, of, a, b); });
    });
  }
}

// Of few tokens and a layer's weight, the tokens are what is packed as panels; a shallow product loses more by the
// turned store than the packing takes.
template <class T, class Out>
void multiply(Exec& ex, const PackedProduct<T, Out>& p) {
  const bool few = p.rows <= 2 * kPanelColumns && p.rows < p.columns && p.depth >= 1024 && !p.b.depth_major;
  multiply_in_chunks(ex, few ? p.as_turned() : p);
}

// What the parts of a deep product came to, as the product wants it.
template <class T, class Out>
void store_sums(const PackedProduct<T, Out>& p, const float* sums) {
  parallel_for(p.rows, p.columns, [&](std::int64_t m) {
    Out* c = p.c + m * p.columns;
    for_lanes(p.columns, [&](std::int64_t n, auto lanes) {
      f32x16 sum = load(sums + m * p.columns + n, lanes);
      if (p.bias != nullptr) sum += load(p.bias + n, lanes);
      store(c + n, p.mode == Accumulate::kAdd ? load(c + n, lanes) + sum : sum, lanes);
    });
  });
}

template <class T, class Out>
void multiply_in_parts_of_depth(Exec& ex, const PackedProduct<T, Out>& p) {
  ScratchScope scope(*ex.scratch);
  const TensorView sums_MN = ex.scratch->take({p.rows, p.columns}, DType::kF32, "sums of a deep product");
  auto* sums = reinterpret_cast<float*>(sums_MN.data);
  for (std::int64_t k = 0; k < p.depth; k += kDepthAtOnce)
    multiply(ex, PackedProduct<T, float>{sums, from_depth(p.a, k), from_depth(p.b, k), p.rows, p.columns,
                                         std::min(kDepthAtOnce, p.depth - k),
                                         k == 0 ? Accumulate::kOverwrite : Accumulate::kAdd});
  store_sums(p, sums);
}

}  // namespace

void multiply_packed_blocks(Exec& ex, const DenseProduct& p) {
  with_product_types(p.a_MK.stored.dtype, p.c_MN.dtype, [&]<class T, class Out>(T, Out) {
    const PackedProduct<T, Out> packed{p.c_MN.as<Out>(),
                                       {p.a_MK.stored.as<T>(), p.a_MK.stored.shape[1], p.a_MK.transposed()},
                                       {p.b_KN.stored.as<T>(), p.b_KN.stored.shape[1], !p.b_KN.transposed()},
                                       p.rows(),
                                       p.columns(),
                                       p.depth(),
                                       p.mode,
                                       p.bias_N.if_given<T>()};
    p.depth() <= kDepthAtOnce ? multiply(ex, packed) : multiply_in_parts_of_depth(ex, packed);
  });
}

bool packed_blocks_have_bf16_instruction() {
  return kPerUnit<UnitOf<bf16>> == 2;
}

}  // namespace upmoe::cpu
