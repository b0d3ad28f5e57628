// Random bits of routers: second choices and the input's jitter.

#include "kernels/ops/router_draws.h"

#include "kernels/cuda/portable/token_draws.cuh"
#include "kernels/cuda/runtime/launch.cuh"
#include "kernels/ops/backend.h"

namespace upmoe::cuda {

namespace {

__global__ void second_choices(std::int32_t* kept, const std::int32_t* index, const float* weight,
                               Draws draws, std::int64_t tokens) {
  const std::int64_t t = global_thread();
  if (t >= tokens) return;
  const std::int32_t second = index[2 * t + 1];
  const float u = uniform_from_bits(
      router_bits(draws.key, draws.token(t), draws.layer, static_cast<std::uint32_t>(second)));
  kept[2 * t] = index[2 * t];
  kept[2 * t + 1] = u < 2.0f * weight[2 * t + 1] ? second : -1;
}

// A thread has four neighbouring elements of a token: those of one counter.
template <bool kAdd, class X>
__global__ void jitter_rows(X* y, const X* x, Draws draws, float amount, std::int64_t tokens,
                            std::int64_t width) {
  const std::int64_t fours = (width + 3) / 4, t = global_thread() / fours, four = global_thread() % fours;
  if (t >= tokens) return;
  const Philox4 bits =
      philox(draws.key, draws.token(t), std::uint64_t{draws.layer} << 32 | static_cast<std::uint64_t>(four));
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (four * 4 + j >= width) continue;
    const std::int64_t i = t * width + four * 4 + j;
    const float u = uniform_from_bits(bits[static_cast<std::size_t>(j)]);
    const float value = to_float(x[i]) * (1.0f + amount * (2.0f * u - 1.0f));
    y[i] = from_float<X>(kAdd ? to_float(y[i]) + value : value);
  }
}

}  // namespace

void draw_second(Exec& ex, TensorView kept_T2, ConstTensorView index_T2, ConstTensorView weight_T2,
                 const TokenDraws& draws) {
  const std::int64_t tokens = index_T2.shape[0];
  launch(ex, blocks_for(tokens, kThreads), kThreads, second_choices, kept_T2.as<std::int32_t>(),
         index_T2.as<std::int32_t>(), weight_T2.as<float>(), on_device(draws), tokens);
}

void jitter(Exec& ex, TensorView y_TD, ConstTensorView x_TD, const TokenDraws& draws, float amount,
            Accumulate mode) {
  const std::int64_t tokens = x_TD.shape[0], width = x_TD.shape[1];
  with_float_type(x_TD.dtype, [&](auto type) {
    using X = decltype(type);
    const auto kernel = mode == Accumulate::kAdd ? jitter_rows<true, X> : jitter_rows<false, X>;
    launch(ex, blocks_for(tokens * ((width + 3) / 4), kThreads), kThreads, kernel, y_TD.as<X>(), x_TD.as<X>(),
           on_device(draws), amount, tokens, width);
  });
}

}  // namespace upmoe::cuda
