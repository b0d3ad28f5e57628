#include "kernels/ops/layer_norm.h"

#include "kernels/cuda/portable/row_sums.cuh"
#include "kernels/cuda/runtime/launch.cuh"
#include "kernels/ops/backend.h"

namespace upmoe::cuda {

namespace {

// One block, one row, gone through three times: its sum, the squares away from the mean, the result.
template <int N, class T>
__global__ void layer_norm_row(T* y, float* mean, float* rstd, const T* x, const T* w, std::int64_t width,
                               float eps) {
  __shared__ float memory[kThreads / kWarp];
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * width;
  const auto count = static_cast<float>(width);
  float sum = 0, squares = 0;
  for (std::int64_t i = threadIdx.x * N; i < width; i += kThreads * N) {
    float v[N];
    load_floats(v, x + row + i);
#pragma unroll
    for (int j = 0; j < N; ++j) sum += v[j];
  }
  const float middle = block_sum(sum, memory) / count;
  for (std::int64_t i = threadIdx.x * N; i < width; i += kThreads * N) {
    float v[N];
    load_floats(v, x + row + i);
#pragma unroll
    for (int j = 0; j < N; ++j) squares += (v[j] - middle) * (v[j] - middle);
  }
  const float scale = 1.0f / sqrtf(block_sum(squares, memory) / count + eps);
  if (threadIdx.x == 0) {
    mean[blockIdx.x] = middle;
    rstd[blockIdx.x] = scale;
  }
  for (std::int64_t i = threadIdx.x * N; i < width; i += kThreads * N) {
    float v[N], weight[N];
    load_floats(v, x + row + i);
    load_floats(weight, w + i);
#pragma unroll
    for (int j = 0; j < N; ++j) v[j] = (v[j] - middle) * scale * weight[j];
    store_floats(y + row + i, v);
  }
}

// With n = (x - mean) rstd and g = dy w: dx = rstd (g - mean(g) - n mean(g n)). One block, one row; dx may be dy.
template <int N, bool kAdd, class T>
__global__ void layer_norm_dx(T* dx, const T* dy, const T* x, const T* w, const float* mean,
                              const float* rstd, std::int64_t width) {
  __shared__ float memory[kThreads / kWarp];
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * width;
  const float middle = mean[blockIdx.x], scale = rstd[blockIdx.x];
  float g_sum = 0, gn_sum = 0;
  for (std::int64_t i = threadIdx.x * N; i < width; i += kThreads * N) {
    float g[N], v[N], weight[N];
    load_floats(g, dy + row + i);
    load_floats(v, x + row + i);
    load_floats(weight, w + i);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      g_sum += g[j] * weight[j];
      gn_sum += g[j] * weight[j] * (v[j] - middle) * scale;
    }
  }
  const float g_mean = block_sum(g_sum, memory) / static_cast<float>(width),
              gn_mean = block_sum(gn_sum, memory) / static_cast<float>(width);
  for (std::int64_t i = threadIdx.x * N; i < width; i += kThreads * N) {
    float g[N], v[N], weight[N], before[N] = {};
    load_floats(g, dy + row + i);
    load_floats(v, x + row + i);
    load_floats(weight, w + i);
    if constexpr (kAdd) load_floats(before, dx + row + i);
#pragma unroll
    for (int j = 0; j < N; ++j)
      g[j] = scale * (g[j] * weight[j] - g_mean - (v[j] - middle) * scale * gn_mean) + before[j];
    store_floats(dx + row + i, g);
  }
}

// dw += dy n, for sum_columns.
template <class T>
struct WeightGradient {
  const T *dy, *x;
  const float *mean, *rstd;
  std::int64_t width;
  template <int N>
  __device__ void at(float (&out)[N], std::int64_t t, std::int64_t c) const {
    float v[N];
    load_floats(out, dy + t * width + c);
    load_floats(v, x + t * width + c);
    const float middle = mean[t], scale = rstd[t];
#pragma unroll
    for (int j = 0; j < N; ++j) out[j] *= (v[j] - middle) * scale;
  }
};

template <class T>
void backward(const Exec& ex, const TensorView& dx_TD, const GradientView& dw_D, const ConstTensorView& dy_TD,
              const CentredRows& normed, const ConstTensorView& w_D, Accumulate mode) {
  constexpr int N = kPack<T>;
  const std::int64_t rows = normed.x_TD.shape[0], width = normed.x_TD.shape[1];
  const bool add = mode == Accumulate::kAdd;
  const T *dy = dy_TD.as<T>(), *x = normed.x_TD.as<T>(), *w = w_D.as<T>();
  const float *mean = normed.mean_T.as<float>(), *rstd = normed.rstd_T.as<float>();
  const bool wide = packs<N>(width, dx_TD.as<T>(), dy, x, w);
  // The weights' gradient first: dx may lie where dy does.
  sum_wide_columns(ex, dw_D, WeightGradient<T>{dy, x, mean, rstd, width}, rows, dy, x);
  const auto kernel = wide ? (add ? layer_norm_dx<N, true, T> : layer_norm_dx<N, false, T>)
                           : (add ? layer_norm_dx<1, true, T> : layer_norm_dx<1, false, T>);
  launch(ex, static_cast<unsigned>(rows), kThreads, kernel, dx_TD.as<T>(), dy, x, w, mean, rstd, width);
}

}  // namespace

void layer_norm_forward(Exec& ex, TensorView y_TD, const RowMoments& moments, ConstTensorView x_TD,
                        ConstTensorView w_D, float eps) {
  with_float_type(x_TD.dtype, [&](auto type) {
    using T = decltype(type);
    const std::int64_t width = x_TD.shape[1];
    const bool wide = packs<kPack<T>>(width, y_TD.as<T>(), x_TD.as<T>(), w_D.as<T>());
    launch(ex, static_cast<unsigned>(x_TD.shape[0]), kThreads,
           wide ? layer_norm_row<kPack<T>, T> : layer_norm_row<1, T>, y_TD.as<T>(),
           moments.mean_T.as<float>(), moments.rstd_T.as<float>(), x_TD.as<T>(), w_D.as<T>(), width, eps);
  });
}

void layer_norm_backward(Exec& ex, TensorView dx_TD, GradientView dw_D, ConstTensorView dy_TD,
                         const CentredRows& rows, ConstTensorView w_D, Accumulate mode) {
  with_float_type(rows.x_TD.dtype,
                  [&](auto type) { backward<decltype(type)>(ex, dx_TD, dw_D, dy_TD, rows, w_D, mode); });
}

}  // namespace upmoe::cuda
