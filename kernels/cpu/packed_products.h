#pragma once
// Packed products on all threads of a rank: one dense product, or one for every expert. Fp32, or bf16 with
// fp32 sums, on every processor.

#include <algorithm>

#include "kernels/core/exec.h"
#include "kernels/cpu/packed_gemm.h"
#include "kernels/cpu/packed_matrices.h"
#include "kernels/cpu/packed_vectors.h"
#include "kernels/cpu/parallel_for.h"

namespace upmoe::cpu {

// How a product is cut into tasks. Any cut gives the same bits.
struct ProductCut {
  std::int64_t task_rows, task_columns, row_parts, column_parts;
  std::int64_t tasks() const { return row_parts * column_parts; }
};

// Columns of a task, at most, and tasks that share a product's rows, so that few products still keep every thread busy:
// four tasks for each by columns, where there are enough, and else two by rows, which pack the same columns once more.
struct TaskLimits {
  std::int64_t columns, row_parts;
};

template <class Form, class Out>
std::int64_t task_columns(const PackedProduct<typename Form::Element, Out>& p, std::int64_t most) {
  return std::min({columns_of_bytes<Form>(Form::kPackedBytes, p.depth), most, p.columns});
}

template <class Form, class ProductOf>
TaskLimits task_limits(std::int64_t products, const ProductOf& product_of) {
  const std::int64_t workers = worker_count();
  std::int64_t columns = 0, parts = 0;
  const auto for_all = [&](auto body) {
    for (std::int64_t i = 0; i < products; ++i)
      if (const auto p = product_of(i); p.rows > 0 && p.columns > 0) body(p);
  };
  for_all([&](const auto& p) { columns += p.columns; });
  const std::int64_t most =
      std::max<std::int64_t>(1, parts_of_size(columns, 4 * workers * kPanelColumns)) * kPanelColumns;
  for_all([&](const auto& p) { parts += parts_of_size(p.columns, task_columns<Form>(p, most)); });
  return {most, parts == 0 ? 1 : parts_of_size(2 * workers, parts)};
}

template <class Form, class Out>
ProductCut cut_product(const PackedProduct<typename Form::Element, Out>& p, const TaskLimits& limits) {
  if (p.rows == 0 || p.columns == 0) return {1, 1, 0, 0};
  if (p.depth == 0 && p.mode == Accumulate::kAdd) return {1, 1, 0, 0};
  const std::int64_t columns = task_columns<Form>(p, limits.columns);
  const std::int64_t some = parts_of_size(parts_of_size(p.rows, limits.row_parts), Form::kStoredRows);
  const std::int64_t rows = std::min(some * Form::kStoredRows, Form::kTaskRows);
  return {rows, columns, parts_of_size(p.rows, rows), parts_of_size(p.columns, columns)};
}

// Computes given(i), a PackedProduct<Form::Element, Out>, for all i < products.
template <class Form, class ProductOf>
void multiply_products_in(Exec& ex, std::int64_t products, const ProductOf& given) {
  const auto product_of = [&](std::int64_t i) {
    const auto p = given(i);
    return Form::is_better_turned(p) ? p.as_turned() : p;
  };
  const TaskLimits limits = task_limits<Form>(products, product_of);
  ScratchScope scope(*ex.scratch);
  auto* first_task =
      ex.scratch->take({products + 1}, DType::kI64, "packed products' tasks").as<std::int64_t>();
  std::int64_t rows_size = 0, columns_size = 0;  // of a worker's workspaces
  first_task[0] = 0;
  for (std::int64_t i = 0; i < products; ++i) {
    const auto p = product_of(i);
    const ProductCut cut = cut_product<Form>(p, limits);
    first_task[i + 1] = first_task[i] + cut.tasks();
    if (cut.tasks() == 0) continue;
    rows_size = std::max(rows_size, Form::rows_size(Form::kBlockRows, p.depth));
    columns_size = std::max(columns_size, packed_columns_size<Form>(p.depth, cut.task_columns));
  }
  static_assert(sizeof(typename Form::Unit) == sizeof(float));
  const std::int64_t workspace_size = rows_size + columns_size;
  std::byte* workspaces =
      ex.scratch->take({worker_count(), workspace_size}, DType::kF32, "packed blocks").data;
  parallel_tasks(first_task[products], [&](std::int64_t task, std::int64_t worker) {
    const std::int64_t* next = std::upper_bound(first_task, first_task + products + 1, task);
    const std::int64_t product = next - first_task - 1;
    const auto p = product_of(product);
    const ProductCut cut = cut_product<Form>(p, limits);
    const std::int64_t part = task - first_task[product];
    const std::int64_t row = part / cut.column_parts * cut.task_rows;
    const std::int64_t column = part % cut.column_parts * cut.task_columns;
    auto* workspace = reinterpret_cast<typename Form::Unit*>(workspaces) + worker * workspace_size;
    multiply_packed<Form>(p, {row, std::min(row + cut.task_rows, p.rows)},
                          {column, std::min(column + cut.task_columns, p.columns)},
                          PackWorkspace<Form>{workspace, workspace + rows_size});
  });
}

// body(Form{}): how elements of T are multiplied on this processor.
template <class T, class Body>
void with_product_form(Body&& body) {
#ifdef UPMOE_MATRIX_REGISTERS
  if constexpr (std::is_same_v<T, bf16>) {
    if (has_matrix_registers()) return body(InMatrices<MatrixRegisters>{});
  }
#endif
  body(InVectors<T>{});
}

template <class T, class ProductOf>
void multiply_products(Exec& ex, std::int64_t products, const ProductOf& product_of) {
  with_product_form<T>([&]<class Form>(Form) { multiply_products_in<Form>(ex, products, product_of); });
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
