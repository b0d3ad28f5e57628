// Noisy top-k: the noise, the load that it makes likely, and their derivative. Rows of experts are short: a thread has
// one token.

#include "kernels/ops/noisy_routing.h"

#include "kernels/cuda/portable/token_draws.cuh"
#include "kernels/cuda/runtime/launch.cuh"
#include "kernels/ops/backend.h"
#include "kernels/ops/router_noise.h"

namespace upmoe::cuda {

namespace {

__device__ float normal(const Draws& draws, std::int64_t t, int e) {
  return router_normal(draws.key, draws.token(t), draws.layer, static_cast<std::uint32_t>(e));
}

struct Noisy {
  const float *logits, *scale, *noisy;
  const std::int32_t* index;
  std::int64_t tokens;
  int experts, k;

  __device__ bool chosen(std::int64_t t, int e) const {
    for (int j = 0; j < k; ++j)
      if (index[t * k + j] == e) return true;
    return false;
  }
  // The largest H that was not chosen; -1 where all were.
  __device__ int next(std::int64_t t) const {
    int best = -1;
    for (int e = 0; e < experts; ++e)
      if (!chosen(t, e) && (best < 0 || noisy[t * experts + e] > noisy[t * experts + best])) best = e;
    return best;
  }
  __device__ int bound(std::int64_t t, int e, int next_of_t) const {
    return chosen(t, e) ? next_of_t : index[t * k + k - 1];
  }
  __device__ float noise(std::int64_t t, int e) const {
    return fmaxf(softplus(scale[t * experts + e]), kLeastNoise);
  }
  __device__ float distance(std::int64_t t, int e, int bound_of_e) const {
    return (logits[t * experts + e] - noisy[t * experts + bound_of_e]) / noise(t, e);
  }
};
Noisy on_device(const NoisyLogits& r) {
  Noisy n{};
  n.logits = r.logits_TE.as<float>();
  n.scale = r.scale_TE.as<float>();
  n.noisy = r.noisy_TE.as<float>();
  n.index = r.index_TK.as<std::int32_t>();
  n.tokens = r.logits_TE.shape[0];
  n.experts = static_cast<int>(r.logits_TE.shape[1]);
  n.k = static_cast<int>(r.index_TK.shape[1]);
  return n;
}

__global__ void add_noise(float* noisy, const float* logits, const float* scale, Draws draws,
                          std::int64_t elements, int experts) {
  const std::int64_t i = global_thread();
  if (i >= elements) return;
  noisy[i] = logits[i] + normal(draws, i / experts, static_cast<int>(i % experts)) * softplus(scale[i]);
}

__global__ void next_experts(std::int32_t* next, Noisy n) {
  const std::int64_t t = global_thread();
  if (t < n.tokens) next[t] = n.next(t);
}

// One block has one expert.
__global__ void sum_chances(double* load, const std::int32_t* next, Noisy n) {
  __shared__ double memory[kThreads / kWarp];
  const int e = static_cast<int>(blockIdx.x);
  double sum = 0;
  for (std::int64_t t = threadIdx.x; t < n.tokens; t += kThreads) {
    const int b = n.bound(t, e, next[t]);
    sum += b < 0 ? 1.0 : static_cast<double>(normal_below(n.distance(t, e, b)));
  }
  sum = block_sum(sum, memory);
  if (threadIdx.x == 0) load[e] = sum;
}

struct NoiseGradient {
  float *dlogits, *dscale;
  const float *dnoisy, *dload;
};

// With P_e = Phi(z_e), z_e = (h_e - H_b) / n_e: dh_e = dP_e phi(z_e) / n_e, dn_e = -z_e dh_e, dH_b = -dh_e. Then of H_j
// as of any: dh_j += dH_j, dn_j += dH_j eps_j. dlogits serves as dH on the way.
__global__ void noise_backward(NoiseGradient g, Noisy n, Draws draws) {
  const std::int64_t t = global_thread();
  if (t >= n.tokens) return;
  const int next = g.dload == nullptr ? -1 : n.next(t);
  float* dlogits = g.dlogits + t * n.experts;
  const auto of_load = [&](int e, int b) {
    if (g.dload == nullptr || b < 0) return 0.0f;
    return g.dload[e] * normal_density(n.distance(t, e, b)) / n.noise(t, e);
  };
  for (int e = 0; e < n.experts; ++e) dlogits[e] = g.dnoisy[t * n.experts + e];
  for (int e = 0; e < n.experts && g.dload != nullptr; ++e) {
    const int b = n.bound(t, e, next);
    if (b >= 0) dlogits[b] -= of_load(e, b);
  }
  for (int e = 0; e < n.experts; ++e) {
    const int b = n.bound(t, e, next);
    const float of_e = of_load(e, b);
    const float dnoise =
        dlogits[e] * normal(draws, t, e) - (of_e == 0.0f ? 0.0f : of_e * n.distance(t, e, b));
    g.dscale[t * n.experts + e] = dnoise * softplus_slope(n.scale[t * n.experts + e]);
    dlogits[e] += of_e;
  }
}

// One block has one expert.
__global__ void sum_weights(double* sum, const float* weight, const std::int32_t* index,
                            std::int64_t assignments) {
  __shared__ double memory[kThreads / kWarp];
  const int e = static_cast<int>(blockIdx.x);
  double mine = 0;
  for (std::int64_t i = threadIdx.x; i < assignments; i += kThreads)
    if (index[i] == e) mine += static_cast<double>(weight[i]);
  mine = block_sum(mine, memory);
  if (threadIdx.x == 0) sum[e] = mine;
}

__global__ void add_of_expert(float* out, const float* dweight, const float* dsum, const std::int32_t* index,
                              std::int64_t assignments) {
  const std::int64_t i = global_thread();
  if (i < assignments) out[i] = dweight[i] + dsum[index[i]];
}

}  // namespace

void add_router_noise(Exec& ex, TensorView noisy_TE, ConstTensorView logits_TE, ConstTensorView scale_TE,
                      const TokenDraws& draws) {
  const std::int64_t elements = logits_TE.elements();
  launch(ex, blocks_for(elements, kThreads), kThreads, add_noise, noisy_TE.as<float>(), logits_TE.as<float>(),
         scale_TE.as<float>(), on_device(draws), elements, static_cast<int>(logits_TE.shape[1]));
}

void noisy_load(Exec& ex, TensorView load_E, const NoisyLogits& routed) {
  const Noisy n = on_device(routed);
  ScratchScope scope(*ex.scratch);
  auto* next = ex.scratch->take({n.tokens}, DType::kI32, "noisy_load").as<std::int32_t>();
  launch(ex, blocks_for(n.tokens, kThreads), kThreads, next_experts, next, n);
  launch(ex, static_cast<unsigned>(n.experts), kThreads, sum_chances, load_E.as<double>(), next, n);
}

void add_router_noise_backward(Exec& ex, TensorView dlogits_TE, TensorView dscale_TE,
                               const NoisyGradient& gradient, const NoisyLogits& routed,
                               const TokenDraws& draws) {
  const NoiseGradient g{dlogits_TE.as<float>(), dscale_TE.as<float>(), gradient.dnoisy_TE.as<float>(),
                        gradient.dload_E.given() ? gradient.dload_E.as<float>() : nullptr};
  const Noisy n = on_device(routed);
  launch(ex, blocks_for(n.tokens, kThreads), kThreads, noise_backward, g, n, on_device(draws));
}

void sum_by_expert(Exec& ex, TensorView sum_E, ConstTensorView weight_TK, ConstTensorView index_TK) {
  launch(ex, static_cast<unsigned>(sum_E.shape[0]), kThreads, sum_weights, sum_E.as<double>(),
         weight_TK.as<float>(), index_TK.as<std::int32_t>(), index_TK.elements());
}

void add_by_expert(Exec& ex, TensorView out_TK, ConstTensorView dweight_TK, ConstTensorView dsum_E,
                   ConstTensorView index_TK) {
  const std::int64_t n = index_TK.elements();
  launch(ex, blocks_for(n, kThreads), kThreads, add_of_expert, out_TK.as<float>(), dweight_TK.as<float>(),
         dsum_E.as<float>(), index_TK.as<std::int32_t>(), n);
}

}  // namespace upmoe::cuda
