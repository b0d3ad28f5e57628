#include "kernels/ops/norm.h"

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/row_sums.cuh"
#include "kernels/ops/backend.h"

namespace upmoe::cuda {

namespace {

// One block, one row: y = w * (x * rstd), where x is first replaced by x + residual when there is one.
template <int N, bool kResidual, class T>
__global__ void norm_row(T* y, T* sum, float* rstd, const T* x, const T* residual, const T* w,
                         std::int64_t width, float eps) {
  __shared__ float memory[kThreads / kWarp];
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * width;
  const T* in = kResidual ? sum : x;
  float squares = 0;
  for (std::int64_t i = threadIdx.x * N; i < width; i += kThreads * N) {
    float v[N];
    load_floats(v, x + row + i);
    if constexpr (kResidual) {
      float r[N];
      load_floats(r, residual + row + i);
#pragma unroll
      for (int j = 0; j < N; ++j)
        v[j] = to_float(from_float<T>(v[j] + r[j]));  // the norm of the sum as stored
      store_floats(sum + row + i, v);
    }
#pragma unroll
    for (int j = 0; j < N; ++j) squares += v[j] * v[j];
  }
  squares = block_sum(squares, memory);
  const float scale = 1.0f / sqrtf(squares / static_cast<float>(width) + eps);
  if (threadIdx.x == 0) rstd[blockIdx.x] = scale;
  for (std::int64_t i = threadIdx.x * N; i < width; i += kThreads * N) {  // its own elements once more
    float v[N], weight[N];
    load_floats(v, in + row + i);
    load_floats(weight, w + i);
#pragma unroll
    for (int j = 0; j < N; ++j) v[j] = to_float(from_float<T>(v[j] * scale)) * weight[j];
    store_floats(y + row + i, v);
  }
}

template <bool kResidual>
void norm_forward(const Exec& ex, const TensorView& y_TD, const TensorView& sum_TD, const TensorView& rstd_T,
                  const ConstTensorView& x_TD, const ConstTensorView& residual_TD, const ConstTensorView& w_D,
                  float eps) {
  const std::int64_t width = x_TD.shape[1];
  with_float_type(x_TD.dtype, [&](auto type) {
    using T = decltype(type);
    T* sum = kResidual ? sum_TD.as<T>() : nullptr;
    const T* residual = kResidual ? residual_TD.as<T>() : nullptr;
    const bool wide = packs<kPack<T>>(width, y_TD.as<T>(), sum, x_TD.as<T>(), residual, w_D.as<T>());
    launch(ex, static_cast<unsigned>(x_TD.shape[0]), kThreads,
           wide ? norm_row<kPack<T>, kResidual, T> : norm_row<1, kResidual, T>, y_TD.as<T>(), sum,
           rstd_T.as<float>(), x_TD.as<T>(), residual, w_D.as<T>(), width, eps);
  });
}

// With n = x rstd and g = dy w: dx = rstd (g - n mean(g n)). One block, one row; dx may be dy.
template <int N, bool kAdd, class T>
__global__ void norm_dx(T* dx, const T* dy, const T* x, const T* w, const float* rstd, std::int64_t width) {
  __shared__ float memory[kThreads / kWarp];
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * width;
  float dot = 0;
  for (std::int64_t i = threadIdx.x * N; i < width; i += kThreads * N) {
    float g[N], v[N], weight[N];
    load_floats(g, dy + row + i);
    load_floats(v, x + row + i);
    load_floats(weight, w + i);
#pragma unroll
    for (int j = 0; j < N; ++j) dot += g[j] * weight[j] * v[j];
  }
  dot = block_sum(dot, memory);
  const float r = rstd[blockIdx.x], n_scale = dot * r * r / static_cast<float>(width);
  for (std::int64_t i = threadIdx.x * N; i < width; i += kThreads * N) {
    float g[N], v[N], weight[N], d[N];
    load_floats(g, dy + row + i);
    load_floats(v, x + row + i);
    load_floats(weight, w + i);
#pragma unroll
    for (int j = 0; j < N; ++j) d[j] = r * (g[j] * weight[j] - v[j] * n_scale);
    if constexpr (kAdd) {
      float before[N];
      load_floats(before, dx + row + i);
#pragma unroll
      for (int j = 0; j < N; ++j) d[j] += before[j];
    }
    store_floats(dx + row + i, d);
  }
}

// dw += dy n, where n is rounded as in the forward: the value of one element, for sum_columns.
template <class T>
struct WeightGradient {
  const T *dy, *x;
  const float* rstd;
  std::int64_t width;
  __device__ float operator()(std::int64_t t, std::int64_t c) const {
    const std::int64_t i = t * width + c;
    return to_float(dy[i]) * to_float(from_float<T>(to_float(x[i]) * rstd[t]));
  }
};

}  // namespace

void rms_norm_forward(Exec& ex, TensorView y_TD, TensorView rstd_T, ConstTensorView x_TD, ConstTensorView w_D,
                      float eps) {
  norm_forward<false>(ex, y_TD, {}, rstd_T, x_TD, {}, w_D, eps);
}

void add_rms_norm_forward(Exec& ex, TensorView y_TD, TensorView sum_TD, TensorView rstd_T,
                          ConstTensorView x_TD, ConstTensorView residual_TD, ConstTensorView w_D, float eps) {
  norm_forward<true>(ex, y_TD, sum_TD, rstd_T, x_TD, residual_TD, w_D, eps);
}

void rms_norm_backward(Exec& ex, TensorView dx_TD, TensorView dw_D, ConstTensorView dy_TD,
                       ConstTensorView x_TD, ConstTensorView w_D, ConstTensorView rstd_T, Accumulate mode) {
  const std::int64_t rows = x_TD.shape[0], width = x_TD.shape[1];
  const bool add = mode == Accumulate::kAdd;
  with_float_type(x_TD.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int N = kPack<T>;
    const T *dy = dy_TD.as<T>(), *x = x_TD.as<T>(), *w = w_D.as<T>();
    // The weights' gradient first: dx may lie where dy does.
    sum_columns(ex, dw_D, WeightGradient<T>{dy, x, rstd_T.as<float>(), width}, rows);
    const bool wide = packs<N>(width, dx_TD.as<T>(), dy, x, w);
    const auto kernel = wide ? (add ? norm_dx<N, true, T> : norm_dx<N, false, T>)
                             : (add ? norm_dx<1, true, T> : norm_dx<1, false, T>);
    launch(ex, static_cast<unsigned>(rows), kThreads, kernel, dx_TD.as<T>(), dy, x, w, rstd_T.as<float>(),
           width);
  });
}

}  // namespace upmoe::cuda
