#include "kernels/ops/gemm.h"

#include "kernels/cuda/library/cublaslt.cuh"
#include "kernels/cuda/portable/row_sums.cuh"
#include "kernels/ops/backend.h"

namespace upmoe::cuda {

namespace {

// c_MN = bias_N in every row, or zeros: what a product over nothing gives, and what one of another dtype adds to.
template <class C, class B>
__global__ void fill_rows(C* c, const B* bias, std::int64_t elements, std::int64_t width) {
  const std::int64_t i = global_thread();
  if (i < elements) c[i] = from_float<C>(bias != nullptr ? to_float(bias[i % width]) : 0.0f);
}

void start_from_bias(const Exec& ex, const TensorView& c_MN, const ConstTensorView* bias_N) {
  with_float_type(c_MN.dtype, [&](auto c_type) {
    with_float_type(bias_N != nullptr ? bias_N->dtype : DType::kF32, [&](auto b_type) {
      using C = decltype(c_type);
      using B = decltype(b_type);
      const B* bias = bias_N != nullptr ? bias_N->as<B>() : nullptr;
      launch(ex, blocks_for(c_MN.elements(), kThreads), kThreads, fill_rows<C, B>, c_MN.as<C>(), bias,
             c_MN.elements(), c_MN.shape[1]);
    });
  });
}

}  // namespace

void gemm(Exec& ex, TensorView c_MN, ConstTensorView a, Transpose transpose_a, ConstTensorView b,
          Transpose transpose_b, Accumulate mode, const ConstTensorView* bias_N) {
  Product p;
  p.m = c_MN.shape[0];
  p.n = c_MN.shape[1];
  p.k = a.shape[transpose_a == Transpose::kNo ? 1 : 0];
  if (p.m == 0 || p.n == 0) return;
  if (p.k == 0) {
    if (mode == Accumulate::kOverwrite) start_from_bias(ex, c_MN, bias_N);
    return;
  }
  p.transpose_a = transpose_a;
  p.transpose_b = transpose_b;
  p.in = a.dtype;
  p.out = c_MN.dtype;
  p.mode = mode;
  p.a = a.data;
  p.b = b.data;
  p.c = c_MN.data;
  if (bias_N != nullptr && bias_N->dtype == c_MN.dtype) {
    p.bias = bias_N->data;
  } else if (bias_N != nullptr) {  // an epilogue takes a bias of the output's dtype alone
    start_from_bias(ex, c_MN, bias_N);
    p.mode = Accumulate::kAdd;
  }
  stream_of(ex).kept<GemmLibrary>().multiply(p);
}

void bias_backward(Exec& ex, TensorView db_N, ConstTensorView dy_TN) {
  with_float_type(dy_TN.dtype, [&](auto type) {
    using T = decltype(type);
    sum_wide_columns(ex, db_N, Rows<T>{dy_TN.as<T>(), dy_TN.shape[1]}, dy_TN.shape[0], dy_TN.as<T>());
  });
}

}  // namespace upmoe::cuda
