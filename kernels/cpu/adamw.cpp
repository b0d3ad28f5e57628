#include "kernels/ops/adamw.h"

#include <algorithm>
#include <cmath>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "kernels/cpu/parallel_for.h"
#include "kernels/cpu/simd.h"
#include "kernels/ops/adamw_factors.h"
#include "kernels/ops/backend.h"

namespace upmoe::cpu {

namespace {

f32x16 sqrt_lanes(f32x16 x) {
// The loop stays scalar, because std::sqrt may set errno; maskz because gcc 12 warns in the plain one.
#ifdef __AVX512F__
  return std::bit_cast<f32x16>(_mm512_maskz_sqrt_ps(0xffff, std::bit_cast<__m512>(x)));
#else
  for (int i = 0; i < kLanes; ++i) x[i] = std::sqrt(x[i]);
  return x;
#endif
}

template <class Weight, class Grad>
void adamw_block(Weight* weight, float* master, float* m, float* v, const Grad* grad, std::int64_t count,
                 const AdamWFactors& f) {
  for_lanes(count, [&](std::int64_t i, auto lanes) {
    const f32x16 g = load(grad + i, lanes) * f.grad_scale;
    const f32x16 m_i = f.beta1 * load(m + i, lanes) + f.one_minus_beta1 * g;
    const f32x16 v_i = f.beta2 * load(v + i, lanes) + f.one_minus_beta2 * (g * g);
    const f32x16 divisor = sqrt_lanes(v_i) * f.inverse_sqrt_bias2 + f.eps;
    const f32x16 w = load(master + i, lanes) * f.keep - f.step_size * (m_i / divisor);
    store(m + i, m_i, lanes);
    store(v + i, v_i, lanes);
    store(master + i, w, lanes);
    store(weight + i, w, lanes);
  });
}

}  // namespace

void adamw(Exec&, TensorView weight, TensorView master, TensorView m, TensorView v, ConstTensorView grad,
           const AdamWStep& step) {
  constexpr std::int64_t kBlock = 4096;
  const std::int64_t n = grad.elements();
  const AdamWFactors factors(step);
  auto *master_of = master.as<float>(), *m_of = m.as<float>(), *v_of = v.as<float>();
  with_float_type(weight.dtype, [&](auto weight_type) {
    with_float_type(grad.dtype, [&](auto grad_type) {
      auto* weight_of = weight.as<decltype(weight_type)>();
      const auto* grad_of = grad.as<decltype(grad_type)>();
      parallel_for((n + kBlock - 1) / kBlock, kBlock, [&](std::int64_t b) {
        const std::int64_t at = b * kBlock;
        adamw_block(weight_of + at, master_of + at, m_of + at, v_of + at, grad_of + at,
                    std::min(kBlock, n - at), factors);
      });
    });
  });
}

}  // namespace upmoe::cpu
