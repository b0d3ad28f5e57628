#include "kernels/ops/norm.h"

#include "kernels/cuda/portable/row_sums.cuh"
#include "kernels/cuda/runtime/launch.cuh"
#include "kernels/ops/backend.h"

namespace upmoe::cuda {

namespace {

// The elements [i, i + N) of a row, after x is replaced by x + residual when there is one; the sum of squares.
template <int N, bool kResidual, class T>
__device__ float load_row(float (&v)[N], T* sum, const T* x, const T* residual, std::int64_t i) {
  load_floats(v, x + i);
  if constexpr (kResidual) {
    float r[N];
    load_floats(r, residual + i);
#pragma unroll
    for (int j = 0; j < N; ++j) v[j] = to_float(from_float<T>(v[j] + r[j]));  // the norm of the sum as stored
    store_floats(sum + i, v);
  }
  float squares = 0;
#pragma unroll
  for (int j = 0; j < N; ++j) squares += v[j] * v[j];
  return squares;
}
template <int N, class T>
__device__ void scale_row(T* y, float (&v)[N], const T* w, float scale) {
  float weight[N];
  load_floats(weight, w);
#pragma unroll
  for (int j = 0; j < N; ++j) v[j] = to_float(from_float<T>(v[j] * scale)) * weight[j];
  store_floats(y, v);
}

// One block, one row: y = w * (x * rstd). The first elements of a thread stay in its registers.
template <int N, bool kResidual, class T>
__global__ void norm_row(T* y, T* sum, float* rstd, const T* x, const T* residual, const T* w,
                         std::int64_t width, float eps) {
  __shared__ float memory[kThreads / kWarp];
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * width, begin = threadIdx.x * N;
  float first[N] = {}, squares = 0;
  if (begin < width) squares = load_row<N, kResidual>(first, sum, x, residual, row + begin);
  for (std::int64_t i = begin + kThreads * N; i < width; i += kThreads * N) {
    float v[N];
    squares += load_row<N, kResidual>(v, sum, x, residual, row + i);
  }
  squares = block_sum(squares, memory);
  const float scale = 1.0f / sqrtf(squares / static_cast<float>(width) + eps);
  if (threadIdx.x == 0) rstd[blockIdx.x] = scale;
  if (begin < width) scale_row(y + row + begin, first, w + begin, scale);
  for (std::int64_t i = begin + kThreads * N; i < width; i += kThreads * N) {  // its own elements once more
    float v[N];
    load_floats(v, (kResidual ? sum : x) + row + i);
    scale_row(y + row + i, v, w + i, scale);
  }
}

template <bool kResidual>
void norm_forward(const Exec& ex, const TensorView& y_TD, const TensorView& sum_TD, const TensorView& rstd_T,
                  const ConstTensorView& x_TD, const ConstTensorView& residual_TD, const NormWeight& weight) {
  const std::int64_t width = x_TD.shape[1];
  with_float_type(x_TD.dtype, [&](auto type) {
    using T = decltype(type);
    T* sum = kResidual ? sum_TD.as<T>() : nullptr;
    const T* residual = kResidual ? residual_TD.as<T>() : nullptr;
    const bool wide = packs<kPack<T>>(width, y_TD.as<T>(), sum, x_TD.as<T>(), residual, weight.w_D.as<T>());
    launch(ex, static_cast<unsigned>(x_TD.shape[0]), kThreads,
           wide ? norm_row<kPack<T>, kResidual, T> : norm_row<1, kResidual, T>, y_TD.as<T>(), sum,
           rstd_T.as<float>(), x_TD.as<T>(), residual, weight.w_D.as<T>(), width, weight.eps);
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

// dw += dy n, where n is rounded as in the forward, for sum_columns.
template <class T>
struct WeightGradient {
  const T *dy, *x;
  const float* rstd;
  std::int64_t width;
  template <int N>
  __device__ void at(float (&out)[N], std::int64_t t, std::int64_t c) const {
    float v[N];
    load_floats(out, dy + t * width + c);
    load_floats(v, x + t * width + c);
    const float scale = rstd[t];
#pragma unroll
    for (int j = 0; j < N; ++j) out[j] *= to_float(from_float<T>(v[j] * scale));
  }
};

// Both gradients in one pass, for rows that fit into a block's registers: thread t has the same N columns of every
// row, and their weights and sums of dw stay with it.
//
//              thread 0  thread 1  ...  thread 255
//   row 0     |    N   |    N    | ... |          |  -> the dot product of all threads, then dx of the row
//   row 1     |        |         |     |          |     (two barriers a row; dx may lie where dy does)
//   ...                                                block b: rows [b * rows_each, (b + 1) * rows_each)
//               total     total          total      -> row b of `partial`, summed over b by another launch
template <int N, bool kAdd, class T>
__global__ void norm_rows_backward(T* dx, float* partial, const T* dy, const T* x, const T* w,
                                   const float* rstd, std::int64_t rows, std::int64_t width,
                                   std::int64_t rows_each) {
  __shared__ float memory[kThreads / kWarp];
  const std::int64_t column = threadIdx.x * N, begin = blockIdx.x * rows_each;
  const std::int64_t end = begin + rows_each < rows ? begin + rows_each : rows;
  const bool mine = column < width;
  float weight[N] = {}, total[N] = {};
  if (mine) load_floats(weight, w + column);
  for (std::int64_t row = begin; row < end; ++row) {
    float g[N] = {}, v[N] = {}, before[N] = {};
    if (mine) {
      load_floats(g, dy + row * width + column);
      load_floats(v, x + row * width + column);
      if constexpr (kAdd) load_floats(before, dx + row * width + column);
    }
    const float r = rstd[row];
    float dot = 0;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      total[j] += g[j] * to_float(from_float<T>(v[j] * r));  // n rounded as in the forward
      g[j] *= weight[j];
      dot += g[j] * v[j];
    }
    dot = block_sum(dot, memory);
    if (!mine) continue;
    const float n_scale = dot * r * r / static_cast<float>(width);
#pragma unroll
    for (int j = 0; j < N; ++j) g[j] = r * (g[j] - v[j] * n_scale) + before[j];
    store_floats(dx + row * width + column, g);
  }
  if (mine) store_floats(partial + blockIdx.x * width + column, total);
}

constexpr std::int64_t kMostBlocks = 512;  // of a pass, on any GPU: the order of sums depends on it

template <class T>
void one_pass(const Exec& ex, const TensorView& dx_TD, const TensorView& dw_D, const T* dy, const T* x,
              const T* w, const float* rstd, std::int64_t rows, bool add) {
  constexpr int N = kPack<T>;
  const std::int64_t width = dw_D.elements(), rows_each = (rows + kMostBlocks - 1) / kMostBlocks;
  const std::int64_t blocks = (rows + rows_each - 1) / rows_each;
  ScratchScope scope(*ex.scratch);
  auto* partial = ex.scratch->take({blocks, width}, DType::kF32, "gradients of a norm's weights").as<float>();
  launch(ex, static_cast<unsigned>(blocks), kThreads,
         add ? norm_rows_backward<N, true, T> : norm_rows_backward<N, false, T>, dx_TD.as<T>(), partial, dy,
         x, w, rstd, rows, width, rows_each);
  sum_wide_columns(ex, dw_D, Rows<float>{partial, width}, blocks, partial);
}

}  // namespace

void rms_norm_forward(Exec& ex, TensorView y_TD, TensorView rstd_T, ConstTensorView x_TD,
                      const NormWeight& weight) {
  norm_forward<false>(ex, y_TD, {}, rstd_T, x_TD, {}, weight);
}

void add_rms_norm_forward(Exec& ex, TensorView y_TD, TensorView sum_TD, TensorView rstd_T,
                          ConstTensorView x_TD, ConstTensorView residual_TD, const NormWeight& weight) {
  norm_forward<true>(ex, y_TD, sum_TD, rstd_T, x_TD, residual_TD, weight);
}

void rms_norm_backward(Exec& ex, TensorView dx_TD, TensorView dw_D, ConstTensorView dy_TD,
                       const NormedRows& normed, ConstTensorView w_D, Accumulate mode) {
  const auto& [x_TD, rstd_T] = normed;
  const std::int64_t rows = x_TD.shape[0], width = x_TD.shape[1];
  const bool add = mode == Accumulate::kAdd;
  with_float_type(x_TD.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int N = kPack<T>;
    const T *dy = dy_TD.as<T>(), *x = x_TD.as<T>(), *w = w_D.as<T>();
    const bool wide = packs<N>(width, dx_TD.as<T>(), dy, x, w);
    if (wide && rows > 0 && width <= kThreads * N)
      return one_pass<T>(ex, dx_TD, dw_D, dy, x, w, rstd_T.as<float>(), rows, add);
    // The weights' gradient first: dx may lie where dy does.
    sum_wide_columns(ex, dw_D, WeightGradient<T>{dy, x, rstd_T.as<float>(), width}, rows, dy, x);
    const auto kernel = wide ? (add ? norm_dx<N, true, T> : norm_dx<N, false, T>)
                             : (add ? norm_dx<1, true, T> : norm_dx<1, false, T>);
    launch(ex, static_cast<unsigned>(rows), kThreads, kernel, dx_TD.as<T>(), dy, x, w, rstd_T.as<float>(),
           width);
  });
}

}  // namespace upmoe::cuda
