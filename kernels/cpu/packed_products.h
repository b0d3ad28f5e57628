#pragma once
// Packed products on all threads of a rank: one dense product, or one for every expert. Fp32, or bf16 with
// fp32 sums, on every processor.

#include <algorithm>

#include "kernels/core/exec.h"
#include "kernels/cpu/packed_gemm.h"
#include "kernels/cpu/parallel_for.h"

namespace upmoe::cpu {

// Rows of one task: enough that packing the columns once more for each is a small part of its work.
constexpr std::int64_t kTaskRows = 10 * kBlockRows;

// How a product is cut into tasks. Any cut gives the same bits.
struct ProductCut {
  std::int64_t task_columns, row_parts, column_parts;
  std::int64_t tasks() const { return row_parts * column_parts; }
};

constexpr std::int64_t parts_of_size(std::int64_t n, std::int64_t size) {
  return (n + size - 1) / size;
}

template <class T, class Out>
ProductCut cut_product(const PackedProduct<T, Out>& p, std::int64_t most_columns) {
  if (p.rows == 0 || p.columns == 0) return {1, 0, 0};
  if (p.depth == 0 && p.mode == Accumulate::kAdd) return {1, 0, 0};
  const std::int64_t columns =
      std::min({columns_of_bytes<T>(kPackedBytes, p.depth), most_columns, p.columns});
  return {columns, parts_of_size(p.rows, kTaskRows), parts_of_size(p.columns, columns)};
}

// So that few products still keep every thread busy: at least four tasks for each where there are columns enough.
template <class ProductOf>
std::int64_t most_task_columns(std::int64_t products, const ProductOf& product_of) {
  std::int64_t columns = 0;
  for (std::int64_t i = 0; i < products; ++i)
    if (product_of(i).rows > 0) columns += product_of(i).columns;
  return std::max<std::int64_t>(1, parts_of_size(columns, 4 * worker_count() * kPanelColumns)) *
         kPanelColumns;
}

// Computes product_of(i), a PackedProduct<T, Out>, for all i < products.
template <class T, class ProductOf>
void multiply_products(Exec& ex, std::int64_t products, const ProductOf& product_of) {
  const std::int64_t most_columns = most_task_columns(products, product_of);
  ScratchScope scope(*ex.scratch);
  auto* first_task =
      ex.scratch->take({products + 1}, DType::kI64, "packed products' tasks").as<std::int64_t>();
  std::int64_t rows_size = 0, columns_size = 0;  // of a worker's workspaces
  first_task[0] = 0;
  for (std::int64_t i = 0; i < products; ++i) {
    const auto p = product_of(i);
    const ProductCut cut = cut_product(p, most_columns);
    first_task[i + 1] = first_task[i] + cut.tasks();
    if (cut.tasks() == 0) continue;
    rows_size = std::max(rows_size, packed_rows_size<T>(kBlockRows, p.depth));
    columns_size = std::max(columns_size, packed_columns_size<T>(p.depth, cut.task_columns));
  }
  static_assert(sizeof(UnitOf<T>) == sizeof(float));
  const std::int64_t workspace_size = rows_size + columns_size;
  std::byte* workspaces =
      ex.scratch->take({worker_count(), workspace_size}, DType::kF32, "packed blocks").data;
  parallel_tasks(first_task[products], [&](std::int64_t task, std::int64_t worker) {
    const std::int64_t* next = std::upper_bound(first_task, first_task + products + 1, task);
    const std::int64_t product = next - first_task - 1;
    const auto p = product_of(product);
    const ProductCut cut = cut_product(p, most_columns);
    const std::int64_t part = task - first_task[product];
    const std::int64_t row = part / cut.column_parts * kTaskRows;
    const std::int64_t column = part % cut.column_parts * cut.task_columns;
    auto* workspace = reinterpret_cast<UnitOf<T>*>(workspaces) + worker * workspace_size;
    multiply_packed(p, {row, std::min(row + kTaskRows, p.rows)},
                    {column, std::min(column + cut.task_columns, p.columns)},
                    PackWorkspace<T>{workspace, workspace + rows_size});
  });
}

// body(T{}, Out{}) for inputs of type T and an output of fp32 or T.
template <class Body>
void with_product_types(DType in, DType out, Body&& body) {
  with_float_type(in, [&](auto in_type) {
    if (out == DType::kF32) return body(in_type, float{});
    body(in_type, in_type);
  });
}

}  // namespace upmoe::cpu
