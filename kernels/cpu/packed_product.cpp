// A dense product on packed blocks. Both factors are packed once for many uses of them, which makes the difference to
// the products of experts (packed_products.h), that have few rows each:
//
//                   b, a chunk of columns at a time: packed by all threads together, into what the last-level cache
//                   keeps for them, then read by all of them
//                  +-----------------------+
//                  |                       |
//                  +=======+=======+=======+
//   a: some rows   | tasks: those rows     |
//   of it, packed  |  and all the columns, |
//   (if they must  |  or a part of them    |
//   be) by the     |  where rows are few   |
//   thread that takes them
//
// A depth of more than kDepthAtOnce is cut, and the sums of the parts are added in fp32, in order.

#include "kernels/cpu/dense_product.h"
#include "kernels/cpu/packed_products.h"

namespace upmoe::cpu {

namespace {

constexpr std::int64_t kChunkBytes = std::int64_t{1} << 22;  // of packed columns
constexpr std::int64_t kDepthAtOnce = 4096;                  // then a panel of bf16 is half a megabyte

// Rows and panels in parts of nearly one size, as many of them as keep every thread busy to the end: four for each, or
// the others wait for a core that is slower, as one is that is shared with somebody.
template <class Form>
struct TaskCut {
  static constexpr std::int64_t kTileRows = Form::kTileRows, kTasksEach = 4;
  std::int64_t rows, tiles, panels, row_parts, column_parts;

  TaskCut(std::int64_t all_rows, std::int64_t all_panels, std::int64_t most_rows)
      : rows(all_rows), tiles(parts_of_size(all_rows, kTileRows)), panels(all_panels) {
    const std::int64_t workers = worker_count();
    const std::int64_t parts =
        std::max(parts_of_size(rows, most_rows), std::min(kTasksEach * workers, rows / Form::kDenseRows));
    row_parts = std::min(tiles, parts_of_size(parts, workers) * workers);
    column_parts = std::min(panels, workers == 1 ? 1 : parts_of_size(2 * workers, row_parts));
  }
  std::int64_t tasks() const { return row_parts * column_parts; }
  Range rows_of(std::int64_t task) const {
    const std::int64_t part = task / column_parts;
    return {part * tiles / row_parts * kTileRows, std::min((part + 1) * tiles / row_parts * kTileRows, rows)};
  }
  Range panels_of(std::int64_t task) const {
    const std::int64_t part = task % column_parts;
    return {part * panels / column_parts, (part + 1) * panels / column_parts};
  }
};

template <class T>
Operand<T> from_depth(const Operand<T>& x, std::int64_t k) {
  return {element(x, 0, k), x.stride, x.depth_major};
}

// By all threads: rows of memory are shared out among them, whether a row is a column or one of the depth.
template <class Form, class T>
void pack_chunk(typename Form::Unit* packed, const Operand<T>& b, Range columns, std::int64_t depth) {
  if (!b.depth_major) {
    parallel_for(parts_of_size(columns.size(), kPanelColumns), kPanelColumns * depth, [&](std::int64_t i) {
      const std::int64_t n = columns.begin + i * kPanelColumns;
      Form::pack_panel(packed + i * kPanelColumns * panel_units<Form>(depth), b,
                       {n, std::min(n + kPanelColumns, columns.end)}, {0, depth}, depth);
    });
    return;
  }
  parallel_for(parts_of_size(depth, kDepthBlock), kDepthBlock * columns.size(), [&](std::int64_t i) {
    pack_depth_block<Form>(packed, b, columns, {i * kDepthBlock, std::min((i + 1) * kDepthBlock, depth)},
                           depth);
  });
}

// Of a depth of at most kDepthAtOnce.
template <class Form, class Out>
void multiply_in_chunks(Exec& ex, const PackedProduct<typename Form::Element, Out>& p) {
  using Unit = typename Form::Unit;
  static_assert(sizeof(Unit) == sizeof(float));
  const std::int64_t chunk = std::min(columns_of_bytes<Form>(kChunkBytes, p.depth),
                                      parts_of_size(p.columns, kPanelColumns) * kPanelColumns);
  const std::int64_t most_rows = Form::most_dense_rows(p.depth);
  const std::int64_t rows_size = Form::rows_size(most_rows, p.depth);
  ScratchScope scope(*ex.scratch);
  const auto take = [&](std::int64_t units, std::string_view name) {
    return reinterpret_cast<Unit*>(ex.scratch->take({units}, DType::kF32, name).data);
  };
  Unit* packed = take(packed_columns_size<Form>(p.depth, chunk), "packed columns");
  Unit* packed_rows = take(worker_count() * rows_size, "packed rows");
  for (std::int64_t first = 0; first < p.columns; first += chunk) {
    const TaskCut<Form> cut(p.rows, parts_of_size(std::min(chunk, p.columns - first), kPanelColumns),
                            most_rows);
    const auto columns_of = [&](Range panels) {
      return Range{first + panels.begin * kPanelColumns,
                   std::min(first + panels.end * kPanelColumns, p.columns)};
    };
    pack_chunk<Form>(packed, p.b, columns_of({0, cut.panels}), p.depth);
    parallel_tasks(cut.tasks(), [&](std::int64_t task, std::int64_t worker) {
      [[maybe_unused]] const typename Form::Use use{};
      const Range rows = cut.rows_of(task), panels = cut.panels_of(task);
      const auto a =
          Form::pack(packed_rows + worker * rows_size, p.a, rows, p.depth, columns_of(panels).size());
      Unit* begin = packed + panels.begin * kPanelColumns * panel_units<Form>(p.depth);
      for_panels<Form>(begin, columns_of(panels), p.depth,
                       [&](Range of, const Unit* b) { multiply_panel<Form>(p, rows, of, a, b); });
    });
  }
}

template <class T, class Out>
void multiply(Exec& ex, const PackedProduct<T, Out>& p) {
  with_product_form<T>([&]<class Form>(Form) {
    multiply_in_chunks<Form>(ex, Form::is_better_turned_when_dense(p) ? p.as_turned() : p);
  });
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
