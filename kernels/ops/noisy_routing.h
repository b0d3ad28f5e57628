#pragma once
// Noisy top-k gating (Shazeer et al. 2017, arXiv 1701.06538, section 4 and appendix A): experts are chosen by
// H_e = h_e + n_e softplus(s_e), with the logits h, the noise's scales s, a second product of the token, and n_e from a
// normal distribution, drawn for the token and the expert. Values are fp32, indices int32.

#include "kernels/ops/router_draws.h"

namespace upmoe {

// What the backward, and the load, need.
struct NoisyLogits {
  ConstTensorView logits_TE, scale_TE;  // h, s
  ConstTensorView noisy_TE;             // H
  ConstTensorView index_TK;             // the K largest H, in falling order
};
// d(loss) / d(H), without the load's part, and d(loss) / d(load_E).
struct NoisyGradient {
  ConstTensorView dnoisy_TE;
  ConstTensorView dload_E = {};  // may be absent
};

}  // namespace upmoe

namespace upmoe::ops {

// noisy_TE = H. A scale that is not finite gives an H that is not, which route_tokens refuses.
void add_router_noise(Exec& ex, TensorView noisy_TE, ConstTensorView logits_TE, ConstTensorView scale_TE,
                      const TokenDraws& draws);

// load_E (fp64, overwritten) = sum over tokens of the probability that e is chosen when its noise alone is drawn anew:
// Phi((h_e - b_e) / softplus(s_e)), with b_e the K-th largest H of the other experts; 1 where K = E.
void noisy_load(Exec& ex, TensorView load_E, const NoisyLogits& routed);

// dlogits_TE, dscale_TE (both overwritten) from the gradients of H, also through the b_e of the load.
void add_router_noise_backward(Exec& ex, TensorView dlogits_TE, TensorView dscale_TE,
                               const NoisyGradient& gradient, const NoisyLogits& routed,
                               const TokenDraws& draws);

// sum_E (fp64, overwritten): of every expert the sum of its weights over all tokens.
void sum_by_expert(Exec& ex, TensorView sum_E, ConstTensorView weight_TK, ConstTensorView index_TK);
// The adjoint: out_TK = dweight_TK + dsum_E[index_TK].
void add_by_expert(Exec& ex, TensorView out_TK, ConstTensorView dweight_TK, ConstTensorView dsum_E,
                   ConstTensorView index_TK);

}  // namespace upmoe::ops
