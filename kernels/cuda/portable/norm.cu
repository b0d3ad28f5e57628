#include "kernels/ops/norm.h"

#include "kernels/cuda/portable/row_sums.cuh"
#include "kernels/cuda/runtime/launch.cuh"
#include "kernels/ops/backend.h"

namespace upmoe::cuda {

namespace {

// How a weight meets x * rstd. Plain: the product of two numbers of type T, so x * rstd is rounded first. Added to one,
// as models that keep it so do it: in fp32, rounded with the result.
struct Plain {
  template <class T>
  __device__ static float normalised(float n) {
    return to_float(from_float<T>(n));
  }
  __device__ static float factor(float w) { return w; }
};
struct PlusOne {
  template <class T>
  __device__ static float normalised(float n) {
    return n;
  }
  __device__ static float factor(float w) { return 1.0f + w; }
};
template <class Body>
void with_form(const NormWeight& weight, Body&& body) {
  if (weight.plus_one) return body(PlusOne{});
  body(Plain{});
}

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
template <class Form, int N, class T>
__device__ void scale_row(T* y, float (&v)[N], const T* w, float scale) {
  float weight[N];
  load_floats(weight, w);
#pragma unroll
  for (int j = 0; j < N; ++j) v[j] = Form::template normalised<T>(v[j] * scale) * Form::factor(weight[j]);
  store_floats(y, v);
}

// One block, one row: y = w * (x * rstd). The first elements of a thread stay in its registers.
template <class Form, int N, bool kResidual, class T>
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
  if (begin < width) scale_row<Form>(y + row + begin, first, w + begin, scale);
  for (std::int64_t i = begin + kThreads * N; i < width; i += kThreads * N) {  // its own elements once more
    float v[N];
    load_floats(v, (kResidual ? sum : x) + row + i);
    scale_row<Form>(y + row + i, v, w + i, scale);
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
    with_form(weight, [&](auto form) {
      using Form = decltype(form);
      launch(ex, static_cast<unsigned>(x_TD.shape[0]), kThreads,
             wide ? norm_row<Form, kPack<T>, kResidual, T> : norm_row<Form, 1, kResidual, T>, y_TD.as<T>(),
             sum, rstd_T.as<float>(), x_TD.as<T>(), residual, weight.w_D.as<T>(), width, weight.eps);
    });
  });
}

// With n = x rstd and g = dy w: dx = rstd (g - n mean(g n)). One block, one row; dx may be dy.
template <class Form, int N, bool kAdd, class T>
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
    for (int j = 0; j < N; ++j) dot += g[j] * Form::factor(weight[j]) * v[j];
  }
  dot = block_sum(dot, memory);
  const float r = rstd[blockIdx.x], n_scale = dot * r * r / static_cast<float>(width);
  for (std::int64_t i = threadIdx.x * N; i < width; i += kThreads * N) {
    float g[N], v[N], weight[N], d[N];
    load_floats(g, dy + row + i);
    load_floats(v, x + row + i);
    load_floats(weight, w + i);
#pragma unroll
    for (int j = 0; j < N; ++j) d[j] = r * (g[j] * Form::factor(weight[j]) - v[j] * n_scale);
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
template <class Form, class T>
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
    for (int j = 0; j < N; ++j) out[j] *= Form::template normalised<T>(v[j] * scale);
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
template <class Form, int N, bool kAdd, class T>
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
      total[j] += g[j] * Form::template normalised<T>(v[j] * r);  // n rounded as in the forward
      g[j] *= Form::factor(weight[j]);
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

template <class Form, class T>
void one_pass(const Exec& ex, const TensorView& dx_TD, const GradientView& dw_D, const T* dy, const T* x,
              const T* w, const float* rstd, std::int64_t rows, bool add) {
  constexpr int N = kPack<T>;
  const std::int64_t width = dw_D.elements(), rows_each = (rows + kMostBlocks - 1) / kMostBlocks;
  const std::int64_t blocks = (rows + rows_each - 1) / rows_each;
  ScratchScope scope(*ex.scratch);
  auto* partial = ex.scratch->take({blocks, width}, DType::kF32, "gradients of a norm's weights").as<float>();
  launch(ex, static_cast<unsigned>(blocks), kThreads,
         add ? norm_rows_backward<Form, N, true, T> : norm_rows_backward<Form, N, false, T>, dx_TD.as<T>(),
         partial, dy, x, w, rstd, rows, width, rows_each);
  sum_wide_columns(ex, dw_D, Rows<float>{partial, width}, blocks, partial);
}

template <class Form, class T>
void norm_backward(const Exec& ex, const TensorView& dx_TD, const GradientView& dw_D,
                   const ConstTensorView& dy_TD, const NormedRows& normed, const ConstTensorView& w_D,
                   Accumulate mode) {
  constexpr int N = kPack<T>;
  const std::int64_t rows = normed.x_TD.shape[0], width = normed.x_TD.shape[1];
  const bool add = mode == Accumulate::kAdd;
  const T *dy = dy_TD.as<T>(), *x = normed.x_TD.as<T>(), *w = w_D.as<T>();
  const float* rstd = normed.rstd_T.as<float>();
  const bool wide = packs<N>(width, dx_TD.as<T>(), dy, x, w);
  if (wide && rows > 0 && width <= kThreads * N)
    return one_pass<Form, T>(ex, dx_TD, dw_D, dy, x, w, rstd, rows, add);
  // The weights' gradient first: dx may lie where dy does.
  sum_wide_columns(ex, dw_D, WeightGradient<Form, T>{dy, x, rstd, width}, rows, dy, x);
  const auto kernel = wide ? (add ? norm_dx<Form, N, true, T> : norm_dx<Form, N, false, T>)
                           : (add ? norm_dx<Form, 1, true, T> : norm_dx<Form, 1, false, T>);
  launch(ex, static_cast<unsigned>(rows), kThreads, kernel, dx_TD.as<T>(), dy, x, w, rstd, width);
}

// The heads of queries and keys of a token: `heads` rows of `width` behind each other, the first `queries` of them
// queries; `stride` from a token to the next in qkv_TH, where values follow.
struct HeadsOfToken {
  std::int64_t heads, queries, width, stride;
};
HeadsOfToken heads_of(const AttentionShape& s) {
  return {s.heads + s.kv_heads, s.heads, s.head_dim, s.qkv_width()};
}

// One warp, one head of one token, in place; what stood there goes to x.
template <class T>
__global__ void norm_heads(T* qkv, T* x, float* rstd, const T* q_w, const T* k_w, std::int64_t rows,
                           HeadsOfToken s, float eps) {
  const std::int64_t row = global_thread() / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if (row >= rows) return;
  const std::int64_t head = row % s.heads;
  T *y = qkv + row / s.heads * s.stride + head * s.width, *kept = x + row * s.width;
  const T* w = head < s.queries ? q_w : k_w;
  float squares = 0;
  for (std::int64_t i = lane; i < s.width; i += kWarp) {
    const T value = y[i];
    kept[i] = value;
    squares += to_float(value) * to_float(value);
  }
  const float scale = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(s.width) + eps);
  if (lane == 0) rstd[row] = scale;
  for (std::int64_t i = lane; i < s.width; i += kWarp)  // its own elements once more
    y[i] = from_float<T>(Plain::normalised<T>(to_float(kept[i]) * scale) * to_float(w[i]));
}

// As norm_dx, of a head: one warp, in place.
template <class T>
__global__ void norm_heads_backward(T* dqkv, const T* x, const float* rstd, const T* q_w, const T* k_w,
                                    std::int64_t rows, HeadsOfToken s) {
  const std::int64_t row = global_thread() / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if (row >= rows) return;
  const std::int64_t head = row % s.heads;
  T* g = dqkv + row / s.heads * s.stride + head * s.width;
  const T *v = x + row * s.width, *w = head < s.queries ? q_w : k_w;
  float dot = 0;
  for (std::int64_t i = lane; i < s.width; i += kWarp)
    dot += to_float(g[i]) * to_float(w[i]) * to_float(v[i]);
  const float r = rstd[row], n_scale = warp_sum(dot) * r * r / static_cast<float>(s.width);
  for (std::int64_t i = lane; i < s.width; i += kWarp)
    g[i] = from_float<T>(r * (to_float(g[i]) * to_float(w[i]) - to_float(v[i]) * n_scale));
}

// Of the weight that heads [begin, end) share, for sum_columns: dy n of a token, summed over its heads.
template <class T>
struct HeadWeightGradient {
  const T *dqkv, *x;
  const float* rstd;
  HeadsOfToken s;
  std::int64_t begin, end;
  template <int N>
  __device__ void at(float (&out)[N], std::int64_t t, std::int64_t c) const {
#pragma unroll
    for (int j = 0; j < N; ++j) out[j] = 0;
    for (std::int64_t head = begin; head < end; ++head) {
      const std::int64_t row = t * s.heads + head;
      const float r = rstd[row];
#pragma unroll
      for (int j = 0; j < N; ++j)
        out[j] += to_float(dqkv[t * s.stride + head * s.width + c + j]) *
                  Plain::normalised<T>(to_float(x[row * s.width + c + j]) * r);
    }
  }
};

}  // namespace

void rms_norm_forward(Exec& ex, TensorView y_TD, TensorView rstd_T, ConstTensorView x_TD,
                      const NormWeight& weight) {
  norm_forward<false>(ex, y_TD, {}, rstd_T, x_TD, {}, weight);
}

void add_rms_norm_forward(Exec& ex, TensorView y_TD, TensorView sum_TD, TensorView rstd_T,
                          ConstTensorView x_TD, ConstTensorView residual_TD, const NormWeight& weight) {
  norm_forward<true>(ex, y_TD, sum_TD, rstd_T, x_TD, residual_TD, weight);
}

void rms_norm_backward(Exec& ex, TensorView dx_TD, GradientView dw_D, ConstTensorView dy_TD,
                       const NormedRows& normed, const NormWeight& weight, Accumulate mode) {
  with_float_type(normed.x_TD.dtype, [&](auto type) {
    with_form(weight, [&](auto form) {
      norm_backward<decltype(form), decltype(type)>(ex, dx_TD, dw_D, dy_TD, normed, weight.w_D, mode);
    });
  });
}

void qk_norm_forward(Exec& ex, TensorView qkv_TH, TensorView x_TP, TensorView rstd_TN,
                     const QkWeights& weights, AttentionShape shape) {
  with_float_type(qkv_TH.dtype, [&](auto type) {
    using T = decltype(type);
    const std::int64_t rows = rstd_TN.elements();
    launch(ex, blocks_for(rows, kThreads / kWarp), kThreads, norm_heads<T>, qkv_TH.as<T>(), x_TP.as<T>(),
           rstd_TN.as<float>(), weights.q_d.as<T>(), weights.k_d.as<T>(), rows, heads_of(shape), weights.eps);
  });
}

void qk_norm_backward(Exec& ex, TensorView dqkv_TH, const QkWeightGradients& dw, ConstTensorView x_TP,
                      ConstTensorView rstd_TN, const QkWeights& weights, AttentionShape shape) {
  with_float_type(dqkv_TH.dtype, [&](auto type) {
    using T = decltype(type);
    const T *dqkv = dqkv_TH.as<T>(), *x = x_TP.as<T>();
    const float* rstd = rstd_TN.as<float>();
    const HeadsOfToken s = heads_of(shape);
    const std::int64_t tokens = dqkv_TH.shape[0], rows = rstd_TN.elements();
    // The weights' gradients first: the rows they are made of are overwritten then.
    sum_columns<1>(ex, dw.q_d, HeadWeightGradient<T>{dqkv, x, rstd, s, 0, s.queries}, tokens);
    sum_columns<1>(ex, dw.k_d, HeadWeightGradient<T>{dqkv, x, rstd, s, s.queries, s.heads}, tokens);
    launch(ex, blocks_for(rows, kThreads / kWarp), kThreads, norm_heads_backward<T>, dqkv_TH.as<T>(), x, rstd,
           weights.q_d.as<T>(), weights.k_d.as<T>(), rows, s);
  });
}

}  // namespace upmoe::cuda
