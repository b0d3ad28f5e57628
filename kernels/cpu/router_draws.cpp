#include "kernels/ops/router_draws.h"

#include <algorithm>

#include "kernels/cpu/parallel_for.h"
#include "kernels/cpu/simd.h"
#include "kernels/cpu/token_draws.h"
#include "kernels/ops/backend.h"

namespace upmoe::cpu {

void draw_second(Exec&, TensorView kept_T2, ConstTensorView index_T2, ConstTensorView weight_T2,
                 const TokenDraws& draws) {
  const auto* index = index_T2.as<std::int32_t>();
  const float* weight = weight_T2.as<float>();
  auto* kept = kept_T2.as<std::int32_t>();
  parallel_for(index_T2.shape[0], 32, [&](std::int64_t t) {
    const std::int32_t second = index[2 * t + 1];
    const float u = uniform_from_bits(
        router_bits(draws.key, token_of(draws, t), draws.layer, static_cast<std::uint32_t>(second)));
    kept[2 * t] = index[2 * t];
    kept[2 * t + 1] = u < 2.0f * weight[2 * t + 1] ? second : -1;
  });
}

void jitter(Exec&, TensorView y_TD, ConstTensorView x_TD, const TokenDraws& draws, float amount,
            Accumulate mode) {
  const std::int64_t width = x_TD.shape[1];
  with_float_type(x_TD.dtype, [&](auto type) {
    using X = decltype(type);
    parallel_for(x_TD.shape[0], 8 * width, [&](std::int64_t t) {
      const X* x = x_TD.as<X>() + t * width;
      X* y = y_TD.as<X>() + t * width;
      for (std::int64_t column = 0; column < width; column += 4) {
        const Philox4 four =
            philox(draws.key, token_of(draws, t),
                   std::uint64_t{draws.layer} << 32 | static_cast<std::uint64_t>(column / 4));
        for (std::int64_t i = column; i < std::min(width, column + 4); ++i) {
          const float u = uniform_from_bits(four[static_cast<std::size_t>(i - column)]);
          const float value = to_float(x[i]) * (1.0f + amount * (2.0f * u - 1.0f));
          y[i] = from_float<X>(mode == Accumulate::kAdd ? to_float(y[i]) + value : value);
        }
      }
    });
  });
}

}  // namespace upmoe::cpu
