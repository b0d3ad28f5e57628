#include "kernels/ops/adamw.h"

#include "kernels/cuda/runtime/launch.cuh"
#include "kernels/ops/adamw_factors.h"
#include "kernels/ops/backend.h"

namespace upmoe::cuda {

namespace {

template <class Weight, class Grad>
struct Slice {
  Weight* weight;
  float *master, *m, *v;
  const Grad* grad;
};

template <int N, class Weight, class Grad>
__device__ void update(const Slice<Weight, Grad>& s, const AdamWFactors& f, std::int64_t i) {
  float g[N], m[N], v[N], w[N];
  load_floats(g, s.grad + i);
  load_floats(m, s.m + i);
  load_floats(v, s.v + i);
  load_floats(w, s.master + i);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    // grad_scale is the clip factor, applied where the gradient is read anyway: no pass of its own.
    g[j] *= f.grad_scale;
    m[j] = f.beta1 * m[j] + f.one_minus_beta1 * g[j];
    v[j] = f.beta2 * v[j] + f.one_minus_beta2 * (g[j] * g[j]);
    w[j] = w[j] * f.keep - f.step_size * (m[j] / (sqrtf(v[j]) * f.inverse_sqrt_bias2 + f.eps));
  }
  store_floats(s.m + i, m);
  store_floats(s.v + i, v);
  store_floats(s.master + i, w);
  store_floats(s.weight + i, w);
}

template <int N, class Weight, class Grad>
__global__ void adamw_elements(Slice<Weight, Grad> s, AdamWFactors f, std::int64_t n) {
  const std::int64_t i = global_thread() * N;
  if (i + N <= n) {
    update<N>(s, f, i);
  } else {
    for (std::int64_t j = i; j < n; ++j) update<1>(s, f, j);
  }
}

}  // namespace

void adamw(Exec& ex, TensorView weight, TensorView master, TensorView m, TensorView v, ConstTensorView grad,
           const AdamWStep& step) {
  const AdamWFactors factors(step);
  const std::int64_t n = grad.elements();
  with_float_type(weight.dtype, [&](auto weight_type) {
    with_float_type(grad.dtype, [&](auto grad_type) {
      using W = decltype(weight_type);
      using G = decltype(grad_type);
      const Slice<W, G> s{weight.as<W>(), master.as<float>(), m.as<float>(), v.as<float>(), grad.as<G>()};
      const bool wide = packs<4>(4, s.weight, s.master, s.m, s.v, s.grad);
      launch(ex, blocks_for(n, std::int64_t{kThreads} * (wide ? 4 : 1)), kThreads,
             wide ? adamw_elements<4, W, G> : adamw_elements<1, W, G>, s, factors, n);
    });
  });
}

}  // namespace upmoe::cuda
