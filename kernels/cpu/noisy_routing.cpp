#include "kernels/ops/noisy_routing.h"

#include <algorithm>

#include "kernels/cpu/router_rows.h"
#include "kernels/cpu/token_draws.h"
#include "kernels/ops/backend.h"
#include "kernels/ops/router_noise.h"

namespace upmoe::cpu {

namespace {

// One token's experts, and the bounds that the others' noise sets: for a chosen expert the largest H that was not
// chosen, for another one the smallest that was.
struct NoisyRow {
  const float *h, *s, *noisy;
  const std::int32_t* index;
  std::int64_t experts, k, next = -1;  // next: the expert behind the chosen ones, -1 where there is none

  NoisyRow(const NoisyLogits& routed, std::int64_t t)
      : h(routed.logits_TE.as<float>() + t * routed.logits_TE.shape[1]),
        s(routed.scale_TE.as<float>() + t * routed.logits_TE.shape[1]),
        noisy(routed.noisy_TE.as<float>() + t * routed.logits_TE.shape[1]),
        index(routed.index_TK.as<std::int32_t>() + t * routed.index_TK.shape[1]),
        experts(routed.logits_TE.shape[1]),
        k(routed.index_TK.shape[1]) {
    for (std::int64_t e = 0; e < experts; ++e)
      if (!chosen(e) && (next < 0 || noisy[e] > noisy[next])) next = e;
  }
  bool chosen(std::int64_t e) const { return std::find(index, index + k, e) != index + k; }
  std::int64_t bound(std::int64_t e) const { return chosen(e) ? next : index[k - 1]; }
  float noise(std::int64_t e) const { return std::max(softplus(s[e]), kLeastNoise); }
  float distance(std::int64_t e) const { return (h[e] - noisy[bound(e)]) / noise(e); }
};

}  // namespace

void add_router_noise(Exec&, TensorView noisy_TE, ConstTensorView logits_TE, ConstTensorView scale_TE,
                      const TokenDraws& draws) {
  const std::int64_t experts = logits_TE.shape[1];
  parallel_for(logits_TE.shape[0], 64 * experts, [&](std::int64_t t) {
    for (std::int64_t e = 0; e < experts; ++e)
      noisy_TE.as<float>()[t * experts + e] =
          logits_TE.as<float>()[t * experts + e] +
          router_normal(draws.key, token_of(draws, t), draws.layer, static_cast<std::uint32_t>(e)) *
              softplus(scale_TE.as<float>()[t * experts + e]);
  });
}

void noisy_load(Exec& ex, TensorView load_E, const NoisyLogits& routed) {
  constexpr std::int64_t kBlock = 256;  // tokens summed by one thread; blocks are added in order
  const std::int64_t tokens = routed.logits_TE.shape[0], experts = routed.logits_TE.shape[1];
  require_in_range(routed.index_TK.as<std::int32_t>(), routed.index_TK.elements(), experts, "index_TK");
  const std::int64_t blocks = (tokens + kBlock - 1) / kBlock;
  ScratchScope scope(*ex.scratch);
  double* partials = ex.scratch->take({blocks, experts}, DType::kF64, "noisy_load").as<double>();
  parallel_for(blocks, 64 * kBlock * experts, [&](std::int64_t b) {
    double* sum = partials + b * experts;
    std::fill_n(sum, experts, 0.0);
    for (std::int64_t t = b * kBlock; t < std::min(tokens, (b + 1) * kBlock); ++t) {
      const NoisyRow row(routed, t);
      for (std::int64_t e = 0; e < experts; ++e)
        sum[e] += row.bound(e) < 0 ? 1.0 : static_cast<double>(normal_below(row.distance(e)));
    }
  });
  double* load = load_E.as<double>();
  std::fill_n(load, experts, 0.0);
  for (std::int64_t b = 0; b < blocks; ++b)
    for (std::int64_t e = 0; e < experts; ++e) load[e] += partials[b * experts + e];
}

// With P_e = Phi(z_e), z_e = (h_e - H_b) / n_e: dh_e = dP_e phi(z_e) / n_e, dn_e = -z_e dh_e, dH_b = -dh_e. Then of H_j
// as of any: dh_j += dH_j, dn_j += dH_j eps_j. dlogits serves as dH on the way.
void add_router_noise_backward(Exec&, TensorView dlogits_TE, TensorView dscale_TE,
                               const NoisyGradient& gradient, const NoisyLogits& routed,
                               const TokenDraws& draws) {
  const std::int64_t tokens = routed.logits_TE.shape[0], experts = routed.logits_TE.shape[1];
  require_in_range(routed.index_TK.as<std::int32_t>(), routed.index_TK.elements(), experts, "index_TK");
  const float* dload = gradient.dload_E.given() ? gradient.dload_E.as<float>() : nullptr;
  parallel_for(tokens, 64 * experts, [&](std::int64_t t) {
    float *dlogits = dlogits_TE.as<float>() + t * experts, *dscale = dscale_TE.as<float>() + t * experts;
    const NoisyRow row(routed, t);
    const auto of_load = [&](std::int64_t e) {
      if (dload == nullptr || row.bound(e) < 0) return 0.0f;
      return dload[e] * normal_density(row.distance(e)) / row.noise(e);
    };
    std::copy_n(gradient.dnoisy_TE.as<float>() + t * experts, experts, dlogits);
    for (std::int64_t e = 0; e < experts; ++e)
      if (const float g = of_load(e); g != 0) dlogits[row.bound(e)] -= g;
    for (std::int64_t e = 0; e < experts; ++e) {
      const float normal =
          router_normal(draws.key, token_of(draws, t), draws.layer, static_cast<std::uint32_t>(e));
      const float g = of_load(e);
      const float dnoise = dlogits[e] * normal - (g == 0 ? 0.0f : g * row.distance(e));
      dscale[e] = dnoise * softplus_slope(row.s[e]);
      dlogits[e] += g;
    }
  });
}

void sum_by_expert(Exec&, TensorView sum_E, ConstTensorView weight_TK, ConstTensorView index_TK) {
  const std::int64_t n = index_TK.elements(), experts = sum_E.shape[0];
  const auto* index = index_TK.as<std::int32_t>();
  require_in_range(index, n, experts, "index_TK");
  double* sum = sum_E.as<double>();
  std::fill_n(sum, experts, 0.0);
  for (std::int64_t i = 0; i < n; ++i) sum[index[i]] += static_cast<double>(weight_TK.as<float>()[i]);
}

void add_by_expert(Exec&, TensorView out_TK, ConstTensorView dweight_TK, ConstTensorView dsum_E,
                   ConstTensorView index_TK) {
  const std::int64_t n = index_TK.elements();
  const auto* index = index_TK.as<std::int32_t>();
  require_in_range(index, n, dsum_E.shape[0], "index_TK");
  parallel_for(n, 2, [&](std::int64_t i) {
    out_TK.as<float>()[i] = dweight_TK.as<float>()[i] + dsum_E.as<float>()[index[i]];
  });
}

}  // namespace upmoe::cpu
