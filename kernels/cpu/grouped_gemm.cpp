#include "kernels/ops/grouped_gemm.h"

#include <vector>

#include "kernels/cpu/packed_products.h"
#include "kernels/cpu/row_products.h"
#include "kernels/ops/backend.h"

namespace upmoe::cpu {

void grouped_gemm_forward(Exec& ex, TensorView y_RN, ConstTensorView x_RK, ConstTensorView w_eNK,
                          const ExpertRows& rows) {
  // y = x w^T: the depth is contiguous in both operands.
  const std::int64_t n = w_eNK.shape[1], k = w_eNK.shape[2];
  const auto* offset = rows.offset_e1.as<std::int32_t>();
  with_product_types(x_RK.dtype, y_RN.dtype, [&]<class T, class Out>(T, Out) {
    const T *x = x_RK.as<T>(), *w = w_eNK.as<T>();
    Out* y = y_RN.as<Out>();
    if (ex.row_by_row && !few_rows_are_packed(x_RK.dtype)) {
      std::vector<RowProduct<T, Out>> products;
      for (std::int64_t i = 0; i < w_eNK.shape[0]; ++i)
        if (const std::int64_t begin = offset[i], end = offset[i + 1]; begin < end)
          products.push_back({y + begin * n, x + begin * k, w + i * n * k, nullptr, end - begin, n, k});
      return multiply_row_products<T, Out>(products);
    }
    multiply_products<T>(ex, w_eNK.shape[0], [=](std::int64_t i) {
      const std::int64_t begin = offset[i], end = offset[i + 1];
      return PackedProduct<T, Out>{
          y + begin * n,         {x + begin * k, k, false}, {w + i * n * k, k, false}, end - begin, n, k,
          Accumulate::kOverwrite};
    });
  });
}

void grouped_gemm_dgrad(Exec& ex, TensorView dx_RK, ConstTensorView dy_RN, ConstTensorView w_eNK,
                        const ExpertRows& rows) {
  // dx = dy w: w's rows are the depth now, one behind the other.
  const std::int64_t n = w_eNK.shape[1], k = w_eNK.shape[2];
  const auto* offset = rows.offset_e1.as<std::int32_t>();
  with_product_types(dy_RN.dtype, dx_RK.dtype, [&]<class T, class Out>(T, Out) {
    const T *dy = dy_RN.as<T>(), *w = w_eNK.as<T>();
    Out* dx = dx_RK.as<Out>();
    multiply_products<T>(ex, w_eNK.shape[0], [=](std::int64_t i) {
      const std::int64_t begin = offset[i], end = offset[i + 1];
      return PackedProduct<T, Out>{
          dx + begin * k,        {dy + begin * n, n, false}, {w + i * n * k, k, true}, end - begin, k, n,
          Accumulate::kOverwrite};
    });
  });
}

void grouped_gemm_wgrad(Exec& ex, TensorView dw_eNK, ConstTensorView dy_RN, ConstTensorView x_RK,
                        const ExpertRows& rows, Accumulate mode) {
  // The sum runs over the expert's rows, so both operands are depth-major; an expert without rows has a depth of 0.
  const std::int64_t n = dw_eNK.shape[1], k = dw_eNK.shape[2];
  const auto* offset = rows.offset_e1.as<std::int32_t>();
  with_product_types(x_RK.dtype, dw_eNK.dtype, [&]<class T, class Out>(T, Out) {
    const T *dy = dy_RN.as<T>(), *x = x_RK.as<T>();
    Out* dw = dw_eNK.as<Out>();
    multiply_products<T>(ex, dw_eNK.shape[0], [=](std::int64_t i) {
      const std::int64_t begin = offset[i], end = offset[i + 1];
      return PackedProduct<T, Out>{
          dw + i * n * k, {dy + begin * n, n, true}, {x + begin * k, k, true}, n, k, end - begin, mode};
    });
  });
}

}  // namespace upmoe::cpu
