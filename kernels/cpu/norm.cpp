#include "kernels/ops/norm.h"

#include <algorithm>
#include <cmath>

#include "kernels/cpu/parallel_for.h"
#include "kernels/cpu/row_sums.h"
#include "kernels/cpu/simd.h"
#include "kernels/ops/backend.h"

namespace upmoe::cpu {

namespace {

// How a weight meets x * rstd. Plain: the product of two numbers of type T, so x * rstd is rounded first. Added to one,
// as models that keep it so do it: in fp32, rounded with the result.
struct Plain {
  template <class T>
  static f32x16 normalised(f32x16 n) {
    return rounded_to<T>(n);
  }
  static f32x16 factor(f32x16 w) { return w; }
};
struct PlusOne {
  template <class T>
  static f32x16 normalised(f32x16 n) {
    return n;
  }
  static f32x16 factor(f32x16 w) { return 1.0f + w; }
};
template <class Body>
void with_form(const NormWeight& weight, Body&& body) {
  if (weight.plus_one) return body(PlusOne{});
  body(Plain{});
}

// One row of y = w * (x * rstd); returns rstd. y may be x.
template <class Form, class T>
float norm_row(T* y, const T* x, const T* w, std::int64_t width, float eps) {
  const float squares = sum_lanes(width, [&](std::int64_t i, auto lanes) {
    const f32x16 v = load(x + i, lanes);
    return v * v;
  });
  const float rstd = 1.0f / std::sqrt(squares / static_cast<float>(width) + eps);
  for_lanes(width, [&](std::int64_t i, auto lanes) {
    const f32x16 normalised = Form::template normalised<T>(load(x + i, lanes) * rstd);
    store(y + i, normalised * Form::factor(load(w + i, lanes)), lanes);
  });
  return rstd;
}

// One row of the backward; adds the row's share of the weight gradient to dw.
// With n = x rstd and g = dy w:  dx = rstd (g - n mean(g n)),  dw += dy n, where n is rounded as in the forward.
template <class Form, bool kAdd, class T>
void norm_row_backward(T* dx, float* dw, const T* dy, const T* x, const T* w, float rstd,
                       std::int64_t width) {
  const float dot = sum_lanes(width, [&](std::int64_t i, auto lanes) {
    return load(dy + i, lanes) * Form::factor(load(w + i, lanes)) * load(x + i, lanes);
  });
  // mean(g n) rstd, to be multiplied by x.
  const float n_scale = dot * rstd * rstd / static_cast<float>(width);
  for_lanes(width, [&](std::int64_t i, auto lanes) {
    const f32x16 dy_i = load(dy + i, lanes), x_i = load(x + i, lanes);
    store(dw + i, load(dw + i, lanes) + dy_i * Form::template normalised<T>(x_i * rstd), lanes);
    f32x16 dx_i = rstd * (dy_i * Form::factor(load(w + i, lanes)) - x_i * n_scale);
    if constexpr (kAdd) dx_i += load(dx + i, lanes);
    store(dx + i, dx_i, lanes);
  });
}

template <class Form, bool kAdd, class T>
void norm_backward(Exec& ex, const TensorView& dx_TD, const GradientView& dw_D, const ConstTensorView& dy_TD,
                   const NormedRows& normed, const ConstTensorView& w_D) {
  const auto& [x_TD, rstd_T] = normed;
  const std::int64_t rows = x_TD.shape[0], width = x_TD.shape[1];
  ScratchScope scope(*ex.scratch);
  float* partials =
      ex.scratch->take({row_blocks(rows), width}, DType::kF32, "rms_norm_backward dw").as<float>();
  T* dx = dx_TD.as<T>();
  const T *dy = dy_TD.as<T>(), *x = x_TD.as<T>(), *w = w_D.as<T>();
  const float* rstd = rstd_T.as<float>();
  for_row_blocks(partials, rows, width, [&](std::int64_t first, std::int64_t last, float* dw) {
    for (std::int64_t t = first; t < last; ++t)
      norm_row_backward<Form, kAdd>(dx + t * width, dw, dy + t * width, x + t * width, w, rstd[t], width);
  });
  add_row_blocks(dw_D, partials, row_blocks(rows));
}

// The heads of queries and keys of one token, one behind the other, as rows of d elements: body(head, weight).
template <class T, class Body>
void for_heads(const AttentionShape& s, const T* q_w, const T* k_w, Body&& body) {
  for (std::int64_t h = 0; h < s.heads + s.kv_heads; ++h) body(h, h < s.heads ? q_w : k_w);
}

template <class T>
void heads_backward(Exec& ex, const TensorView& dqkv_TH, const QkWeightGradients& dw,
                    const ConstTensorView& x_TP, const ConstTensorView& rstd_TN, const QkWeights& weights,
                    const AttentionShape& s) {
  const std::int64_t rows = dqkv_TH.shape[0], H = s.qkv_width(), N = s.heads + s.kv_heads, d = s.head_dim;
  ScratchScope scope(*ex.scratch);
  const std::int64_t blocks = row_blocks(rows);
  float* partials = ex.scratch->take({2, blocks, d}, DType::kF32, "qk_norm_backward dw").as<float>();
  float* k_partials = partials + blocks * d;
  T* dqkv = dqkv_TH.as<T>();
  const T *x = x_TP.as<T>(), *q_w = weights.q_d.as<T>(), *k_w = weights.k_d.as<T>();
  const float* rstd = rstd_TN.as<float>();
  for_row_blocks(partials, rows, d, [&](std::int64_t first, std::int64_t last, float* dq_w) {
    float* dk_w = k_partials + (dq_w - partials);
    std::fill_n(dk_w, d, 0.0f);
    for (std::int64_t t = first; t < last; ++t)
      for_heads(s, q_w, k_w, [&](std::int64_t h, const T* w) {
        T* row = dqkv + t * H + h * d;
        norm_row_backward<Plain, false>(row, h < s.heads ? dq_w : dk_w, row, x + (t * N + h) * d, w,
                                        rstd[t * N + h], d);
      });
  });
  add_row_blocks(dw.q_d, partials, blocks);
  add_row_blocks(dw.k_d, k_partials, blocks);
}

}  // namespace

void rms_norm_forward(Exec&, TensorView y_TD, TensorView rstd_T, ConstTensorView x_TD,
                      const NormWeight& weight) {
  const std::int64_t rows = x_TD.shape[0], width = x_TD.shape[1];
  float* rstd = rstd_T.as<float>();
  with_float_type(x_TD.dtype, [&](auto type) {
    using T = decltype(type);
    T* y = y_TD.as<T>();
    const T *x = x_TD.as<T>(), *w = weight.w_D.as<T>();
    with_form(weight, [&](auto form) {
      parallel_for(rows, width, [&](std::int64_t t) {
        rstd[t] = norm_row<decltype(form)>(y + t * width, x + t * width, w, width, weight.eps);
      });
    });
  });
}

void add_rms_norm_forward(Exec&, TensorView y_TD, TensorView sum_TD, TensorView rstd_T, ConstTensorView x_TD,
                          ConstTensorView residual_TD, const NormWeight& weight) {
  const std::int64_t rows = x_TD.shape[0], width = x_TD.shape[1];
  float* rstd = rstd_T.as<float>();
  with_float_type(x_TD.dtype, [&](auto type) {
    using T = decltype(type);
    T *y = y_TD.as<T>(), *sum = sum_TD.as<T>();
    const T *x = x_TD.as<T>(), *residual = residual_TD.as<T>(), *w = weight.w_D.as<T>();
    with_form(weight, [&](auto form) {
      parallel_for(rows, width, [&](std::int64_t t) {
        const std::int64_t row = t * width;
        for_lanes(width, [&](std::int64_t i, auto lanes) {
          store(sum + row + i, load(x + row + i, lanes) + load(residual + row + i, lanes), lanes);
        });
        rstd[t] = norm_row<decltype(form)>(y + row, sum + row, w, width, weight.eps);  // of the sum as stored
      });
    });
  });
}

void rms_norm_backward(Exec& ex, TensorView dx_TD, GradientView dw_D, ConstTensorView dy_TD,
                       const NormedRows& rows, const NormWeight& weight, Accumulate mode) {
  with_float_type(rows.x_TD.dtype, [&](auto type) {
    using T = decltype(type);
    with_form(weight, [&](auto form) {
      using Form = decltype(form);
      if (mode == Accumulate::kAdd)
        return norm_backward<Form, true, T>(ex, dx_TD, dw_D, dy_TD, rows, weight.w_D);
      norm_backward<Form, false, T>(ex, dx_TD, dw_D, dy_TD, rows, weight.w_D);
    });
  });
}

void qk_norm_forward(Exec&, TensorView qkv_TH, TensorView x_TP, TensorView rstd_TN, const QkWeights& weights,
                     AttentionShape shape) {
  const std::int64_t H = shape.qkv_width(), N = shape.heads + shape.kv_heads, d = shape.head_dim;
  float* rstd = rstd_TN.as<float>();
  with_float_type(qkv_TH.dtype, [&](auto type) {
    using T = decltype(type);
    T *qkv = qkv_TH.as<T>(), *x = x_TP.as<T>();
    const T *q_w = weights.q_d.as<T>(), *k_w = weights.k_d.as<T>();
    parallel_for(qkv_TH.shape[0], N * d, [&](std::int64_t t) {
      std::copy_n(qkv + t * H, N * d, x + t * N * d);
      for_heads(shape, q_w, k_w, [&](std::int64_t h, const T* w) {
        rstd[t * N + h] = norm_row<Plain>(qkv + t * H + h * d, x + (t * N + h) * d, w, d, weights.eps);
      });
    });
  });
}

void qk_norm_backward(Exec& ex, TensorView dqkv_TH, const QkWeightGradients& dw, ConstTensorView x_TP,
                      ConstTensorView rstd_TN, const QkWeights& weights, AttentionShape shape) {
  with_float_type(dqkv_TH.dtype, [&](auto type) {
    heads_backward<decltype(type)>(ex, dqkv_TH, dw, x_TP, rstd_TN, weights, shape);
  });
}

}  // namespace upmoe::cpu
