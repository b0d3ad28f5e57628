#include "kernels/ops/norm.h"

#include <cmath>

#include "kernels/cpu/parallel_for.h"
#include "kernels/cpu/row_sums.h"
#include "kernels/cpu/simd.h"
#include "kernels/ops/backend.h"

namespace upmoe::cpu {

namespace {

// One row of y = w * (x * rstd); returns rstd.
template <class T>
float norm_row(T* y, const T* x, const T* w, std::int64_t width, float eps) {
  const float squares = sum_lanes(width, [&](std::int64_t i, auto lanes) {
    const f32x16 v = load(x + i, lanes);
    return v * v;
  });
  const float rstd = 1.0f / std::sqrt(squares / static_cast<float>(width) + eps);
  for_lanes(width, [&](std::int64_t i, auto lanes) {
    const f32x16 normalised = rounded_to<T>(load(x + i, lanes) * rstd);
    store(y + i, normalised * load(w + i, lanes), lanes);
  });
  return rstd;
}

// One row of the backward; adds the row's share of the weight gradient to dw.
// With n = x rstd and g = dy w:  dx = rstd (g - n mean(g n)),  dw += dy n, where n is rounded as in the forward.
template <class T, bool kAdd>
void norm_row_backward(T* dx, float* dw, const T* dy, const T* x, const T* w, float rstd,
                       std::int64_t width) {
  const float dot = sum_lanes(width, [&](std::int64_t i, auto lanes) {
    return load(dy + i, lanes) * load(w + i, lanes) * load(x + i, lanes);
  });
  // mean(g n) rstd, to be multiplied by x.
  const float n_scale = dot * rstd * rstd / static_cast<float>(width);
  for_lanes(width, [&](std::int64_t i, auto lanes) {
    const f32x16 dy_i = load(dy + i, lanes), x_i = load(x + i, lanes);
    store(dw + i, load(dw + i, lanes) + dy_i * rounded_to<T>(x_i * rstd), lanes);
    f32x16 dx_i = rstd * (dy_i * load(w + i, lanes) - x_i * n_scale);
    if constexpr (kAdd) dx_i += load(dx + i, lanes);
    store(dx + i, dx_i, lanes);
  });
}

template <class T, bool kAdd>
void norm_backward(Exec& ex, const TensorView& dx_TD, const TensorView& dw_D, const ConstTensorView& dy_TD,
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
      norm_row_backward<T, kAdd>(dx + t * width, dw, dy + t * width, x + t * width, w, rstd[t], width);
  });
  add_row_blocks(dw_D, partials, row_blocks(rows));
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
    parallel_for(rows, width, [&](std::int64_t t) {
      rstd[t] = norm_row(y + t * width, x + t * width, w, width, weight.eps);
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
    parallel_for(rows, width, [&](std::int64_t t) {
      const std::int64_t row = t * width;
      for_lanes(width, [&](std::int64_t i, auto lanes) {
        store(sum + row + i, load(x + row + i, lanes) + load(residual + row + i, lanes), lanes);
      });
      rstd[t] = norm_row(y + row, sum + row, w, width, weight.eps);  // of the sum as stored
    });
  });
}

void rms_norm_backward(Exec& ex, TensorView dx_TD, TensorView dw_D, ConstTensorView dy_TD,
                       const NormedRows& rows, ConstTensorView w_D, Accumulate mode) {
  with_float_type(rows.x_TD.dtype, [&](auto type) {
    using T = decltype(type);
    if (mode == Accumulate::kAdd) return norm_backward<T, true>(ex, dx_TD, dw_D, dy_TD, rows, w_D);
    norm_backward<T, false>(ex, dx_TD, dw_D, dy_TD, rows, w_D);
  });
}

}  // namespace upmoe::cpu
