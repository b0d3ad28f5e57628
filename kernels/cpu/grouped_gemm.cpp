#include "kernels/ops/grouped_gemm.h"

#include <algorithm>

#include "kernels/cpu/element_type.h"
#include "kernels/cpu/packed_gemm.h"
#include "kernels/cpu/parallel_for.h"
#include "kernels/ops/backend.h"

namespace upmoe::cpu {

namespace {

// Rows of one task: enough that packing the columns once more for each is a small part of its work.
constexpr std::int64_t kTaskRows = 10 * kBlockRows;

// How a product is cut into tasks. Any cut gives the same bits.
struct Cut {
  std::int64_t task_columns, row_parts, column_parts;
  std::int64_t tasks() const { return row_parts * column_parts; }
};

std::int64_t parts(std::int64_t n, std::int64_t size) {
  return (n + size - 1) / size;
}

template <class T, class Out>
Cut cut_product(const PackedProduct<T, Out>& p, std::int64_t most_columns) {
  if (p.rows == 0 || p.columns == 0) return {1, 0, 0};
  if (p.depth == 0 && p.mode == Accumulate::kAdd) return {1, 0, 0};
  const std::int64_t columns = std::min({columns_in_cache<T>(p.depth), most_columns, p.columns});
  return {columns, parts(p.rows, kTaskRows), parts(p.columns, columns)};
}

// So that few experts still keep every thread busy: at least four tasks for each where there are columns
// enough.
template <class ProductOf>
std::int64_t most_task_columns(std::int64_t experts, const ProductOf& product_of) {
  std::int64_t columns = 0;
  for (std::int64_t i = 0; i < experts; ++i)
    if (product_of(i).rows > 0) columns += product_of(i).columns;
  return std::max<std::int64_t>(1, parts(columns, 4 * worker_count() * kPanelColumns)) * kPanelColumns;
}

// Computes product_of(i), a PackedProduct<T, Out>, for all experts i.
template <class T, class ProductOf>
void multiply_experts(Exec& ex, std::int64_t experts, const ProductOf& product_of) {
  const std::int64_t most_columns = most_task_columns(experts, product_of);
  ScratchScope scope(*ex.scratch);
  auto* first_task = ex.scratch->take({experts + 1}, DType::kI64, "grouped_gemm tasks").as<std::int64_t>();
  std::int64_t rows_size = 0, columns_size = 0;  // of a worker's workspaces
  first_task[0] = 0;
  for (std::int64_t i = 0; i < experts; ++i) {
    const auto p = product_of(i);
    const Cut cut = cut_product(p, most_columns);
    first_task[i + 1] = first_task[i] + cut.tasks();
    if (cut.tasks() == 0) continue;
    rows_size = std::max(rows_size, packed_rows_size<T>(p.depth));
    columns_size = std::max(columns_size, packed_columns_size<T>(p.depth, cut.task_columns));
  }
  static_assert(sizeof(UnitOf<T>) == sizeof(float));
  const std::int64_t workspace_size = rows_size + columns_size;
  std::byte* workspaces =
      ex.scratch->take({worker_count(), workspace_size}, DType::kF32, "grouped_gemm packed blocks").data;
  parallel_tasks(first_task[experts], [&](std::int64_t task, std::int64_t worker) {
    const std::int64_t* next = std::upper_bound(first_task, first_task + experts + 1, task);
    const std::int64_t expert = next - first_task - 1;
    const auto p = product_of(expert);
    const Cut cut = cut_product(p, most_columns);
    const std::int64_t part = task - first_task[expert];
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
void with_types(DType in, DType out, Body&& body) {
  with_float_type(in, [&](auto in_type) {
    if (out == DType::kF32) return body(in_type, float{});
    body(in_type, in_type);
  });
}

}  // namespace

void grouped_gemm_forward(Exec& ex, TensorView y_RN, ConstTensorView x_RK, ConstTensorView w_eNK,
                          std::span<const std::int64_t> expert_offsets) {
  const std::int64_t n = w_eNK.shape[1], k = w_eNK.shape[2];
  with_types(x_RK.dtype, y_RN.dtype, [&]<class T, class Out>(T, Out) {
    const T *x = x_RK.as<T>(), *w = w_eNK.as<T>();
    Out* y = y_RN.as<Out>();
    multiply_experts<T>(ex, w_eNK.shape[0], [=](std::int64_t i) {
      const auto expert = static_cast<std::size_t>(i);
      const std::int64_t begin = expert_offsets[expert], end = expert_offsets[expert + 1];
      return PackedProduct<T, Out>{
          y + begin * n,         {x + begin * k, k, false}, {w + i * n * k, k, false}, end - begin, n, k,
          Accumulate::kOverwrite};
    });
  });
}

void grouped_gemm_dgrad(Exec& ex, TensorView dx_RK, ConstTensorView dy_RN, ConstTensorView w_eNK,
                        std::span<const std::int64_t> expert_offsets) {
  const std::int64_t n = w_eNK.shape[1], k = w_eNK.shape[2];
  with_types(dy_RN.dtype, dx_RK.dtype, [&]<class T, class Out>(T, Out) {
    const T *dy = dy_RN.as<T>(), *w = w_eNK.as<T>();
    Out* dx = dx_RK.as<Out>();
    multiply_experts<T>(ex, w_eNK.shape[0], [=](std::int64_t i) {
      const auto expert = static_cast<std::size_t>(i);
      const std::int64_t begin = expert_offsets[expert], end = expert_offsets[expert + 1];
      return PackedProduct<T, Out>{
          dx + begin * k,        {dy + begin * n, n, false}, {w + i * n * k, k, true}, end - begin, k, n,
          Accumulate::kOverwrite};
    });
  });
}

void grouped_gemm_wgrad(Exec& ex, TensorView dw_eNK, ConstTensorView dy_RN, ConstTensorView x_RK,
                        std::span<const std::int64_t> expert_offsets, Accumulate mode) {
  const std::int64_t n = dw_eNK.shape[1], k = dw_eNK.shape[2];
  with_types(x_RK.dtype, dw_eNK.dtype, [&]<class T, class Out>(T, Out) {
    const T *dy = dy_RN.as<T>(), *x = x_RK.as<T>();
    Out* dw = dw_eNK.as<Out>();
    multiply_experts<T>(ex, dw_eNK.shape[0], [=](std::int64_t i) {
      const auto expert = static_cast<std::size_t>(i);
      const std::int64_t begin = expert_offsets[expert], end = expert_offsets[expert + 1];
      return PackedProduct<T, Out>{
          dw + i * n * k, {dy + begin * n, n, true}, {x + begin * k, k, true}, n, k, end - begin, mode};
    });
  });
}

}  // namespace upmoe::cpu
