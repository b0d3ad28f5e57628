#include "kernels/ops/layer_norm.h"

#include <cmath>

#include "kernels/cpu/parallel_for.h"
#include "kernels/cpu/row_sums.h"
#include "kernels/cpu/simd.h"
#include "kernels/ops/backend.h"

namespace upmoe::cpu {

namespace {

struct Row {
  float mean, rstd;
};

// Lanes past the end load zeros, which are -mean when they are centred: they are left out.
template <class T>
Row moments_of(const T* x, std::int64_t width, float eps) {
  const auto count = static_cast<float>(width);
  const float mean = sum_lanes(width, [&](std::int64_t i, auto lanes) { return load(x + i, lanes); }) / count;
  const float squares = sum_lanes(width, [&](std::int64_t i, auto lanes) {
    const f32x16 centred = load(x + i, lanes) - mean;
    const i32x16 inside = lane_index() < splat(static_cast<std::int32_t>(lanes.count));
    return inside ? centred * centred : f32x16{};
  });
  return {mean, 1.0f / std::sqrt(squares / count + eps)};
}

// With n = (x - mean) rstd and g = dy w: dx = rstd (g - mean(g) - n mean(g n)), dw += dy n. dx may be dy.
template <bool kAdd, class T>
void row_backward(T* dx, float* dw, const T* dy, const T* x, const T* w, const Row& row, std::int64_t width) {
  const auto count = static_cast<float>(width);
  const float g_mean =
      sum_lanes(width, [&](std::int64_t i, auto lanes) { return load(dy + i, lanes) * load(w + i, lanes); }) /
      count;
  const float gn_mean = sum_lanes(width,
                                  [&](std::int64_t i, auto lanes) {
                                    return load(dy + i, lanes) * load(w + i, lanes) *
                                           (load(x + i, lanes) - row.mean) * row.rstd;
                                  }) /
                        count;
  for_lanes(width, [&](std::int64_t i, auto lanes) {
    const f32x16 dy_i = load(dy + i, lanes), n_i = (load(x + i, lanes) - row.mean) * row.rstd;
    store(dw + i, load(dw + i, lanes) + dy_i * n_i, lanes);
    f32x16 dx_i = row.rstd * (dy_i * load(w + i, lanes) - g_mean - n_i * gn_mean);
    if constexpr (kAdd) dx_i += load(dx + i, lanes);
    store(dx + i, dx_i, lanes);
  });
}

template <bool kAdd, class T>
void backward(Exec& ex, const TensorView& dx_TD, const GradientView& dw_D, const ConstTensorView& dy_TD,
              const CentredRows& normed, const ConstTensorView& w_D) {
  const std::int64_t rows = normed.x_TD.shape[0], width = normed.x_TD.shape[1];
  ScratchScope scope(*ex.scratch);
  float* partials =
      ex.scratch->take({row_blocks(rows), width}, DType::kF32, "layer_norm_backward dw").as<float>();
  T* dx = dx_TD.as<T>();
  const T *dy = dy_TD.as<T>(), *x = normed.x_TD.as<T>(), *w = w_D.as<T>();
  const float *mean = normed.mean_T.as<float>(), *rstd = normed.rstd_T.as<float>();
  for_row_blocks(partials, rows, width, [&](std::int64_t first, std::int64_t last, float* dw) {
    for (std::int64_t t = first; t < last; ++t)
      row_backward<kAdd>(dx + t * width, dw, dy + t * width, x + t * width, w, {mean[t], rstd[t]}, width);
  });
  add_row_blocks(dw_D, partials, row_blocks(rows));
}

}  // namespace

void layer_norm_forward(Exec&, TensorView y_TD, const RowMoments& moments, ConstTensorView x_TD,
                        ConstTensorView w_D, float eps) {
  const std::int64_t rows = x_TD.shape[0], width = x_TD.shape[1];
  float *mean = moments.mean_T.as<float>(), *rstd = moments.rstd_T.as<float>();
  with_float_type(x_TD.dtype, [&](auto type) {
    using T = decltype(type);
    T* y = y_TD.as<T>();
    const T *x = x_TD.as<T>(), *w = w_D.as<T>();
    parallel_for(rows, width, [&](std::int64_t t) {
      const T* row = x + t * width;
      const Row m = moments_of(row, width, eps);
      mean[t] = m.mean;
      rstd[t] = m.rstd;
      for_lanes(width, [&](std::int64_t i, auto lanes) {
        store(y + t * width + i, (load(row + i, lanes) - m.mean) * m.rstd * load(w + i, lanes), lanes);
      });
    });
  });
}

void layer_norm_backward(Exec& ex, TensorView dx_TD, GradientView dw_D, ConstTensorView dy_TD,
                         const CentredRows& rows, ConstTensorView w_D, Accumulate mode) {
  with_float_type(rows.x_TD.dtype, [&](auto type) {
    using T = decltype(type);
    if (mode == Accumulate::kAdd) return backward<true, T>(ex, dx_TD, dw_D, dy_TD, rows, w_D);
    backward<false, T>(ex, dx_TD, dw_D, dy_TD, rows, w_D);
  });
}

}  // namespace upmoe::cpu
