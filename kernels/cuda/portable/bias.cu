#include "kernels/cuda/portable/bias.h"

#include "kernels/cuda/portable/row_sums.cuh"
#include "kernels/ops/backend.h"

namespace upmoe::cuda {

namespace {

template <class C, class B>
__global__ void fill_rows(C* c, const B* bias, std::int64_t elements, std::int64_t width) {
  const std::int64_t i = global_thread();
  if (i < elements) c[i] = from_float<C>(bias != nullptr ? to_float(bias[i % width]) : 0.0f);
}

}  // namespace

void start_from_bias(const Exec& ex, const TensorView& c_MN, const ConstTensorView& bias_N) {
  with_float_type(c_MN.dtype, [&](auto c_type) {
    with_float_type(bias_N.dtype, [&](auto b_type) {
      using C = decltype(c_type);
      using B = decltype(b_type);
      const B* bias = bias_N.if_given<B>();
      launch(ex, blocks_for(c_MN.elements(), kThreads), kThreads, fill_rows<C, B>, c_MN.as<C>(), bias,
             c_MN.elements(), c_MN.shape[1]);
    });
  });
}

void bias_backward(Exec& ex, GradientView db_N, ConstTensorView dy_TN) {
  with_float_type(dy_TN.dtype, [&](auto type) {
    using T = decltype(type);
    sum_wide_columns(ex, db_N, Rows<T>{dy_TN.as<T>(), dy_TN.shape[1]}, dy_TN.shape[0], dy_TN.as<T>());
  });
}

}  // namespace upmoe::cuda
