#pragma once
// Root-mean-square norm: y = w * (x * rstd), rstd = 1 / sqrt(mean(x^2) + eps) in fp32 per row. With bf16 the
// normalised x is rounded to bf16 before it is multiplied by w, as transformers does. With a weight that is added to
// one, y = (1 + w) * (x * rstd) in fp32, rounded once: so transformers does where models have such weights.
// x, y, w: fp32 or bf16, the same; rstd_T: fp32.

#include "kernels/ops/attention.h"

namespace upmoe {
struct NormWeight {
  ConstTensorView w_D;
  float eps = 0;
  bool plus_one = false;
};
// Input of a norm as its backward knows it.
struct NormedRows {
  ConstTensorView x_TD, rstd_T;
};

// Of the heads of queries and keys. P = (heads + kv_heads) head_dim, N = heads + kv_heads.
struct QkWeights {
  ConstTensorView q_d, k_d;
  float eps = 0;
};
struct QkWeightGradients {
  GradientView q_d, k_d;
};
}  // namespace upmoe

namespace upmoe::ops {

void rms_norm_forward(Exec& ex, TensorView y_TD, TensorView rstd_T, ConstTensorView x_TD,
                      const NormWeight& weight);

// sum_TD = x_TD + residual_TD (may alias either), y_TD = norm of sum_TD, in one pass; y_TD may be x_TD. To the bit what
// an addition and then a norm give: the norm is that of the sum as stored.
void add_rms_norm_forward(Exec& ex, TensorView y_TD, TensorView sum_TD, TensorView rstd_T,
                          ConstTensorView x_TD, ConstTensorView residual_TD, const NormWeight& weight);

// dx_TD (+)= gradient of the input (mode says which), dw_D (+)= gradient of the weight, summed over rows in an
// order that does not depend on the number of threads. dx may alias dy.
void rms_norm_backward(Exec& ex, TensorView dx_TD, GradientView dw_D, ConstTensorView dy_TD,
                       const NormedRows& rows, const NormWeight& weight, Accumulate mode);

// The same norm of each head of the queries and keys in qkv_TH, over its d = head_dim elements and in place, with one
// weight for all heads of each. Writes what was normed to x_TP, and rstd_TN (fp32), for the backward.
void qk_norm_forward(Exec& ex, TensorView qkv_TH, TensorView x_TP, TensorView rstd_TN,
                     const QkWeights& weights, AttentionShape shape);

// The query and key parts of dqkv_TH become the gradients of what was normed; dw (+)= , summed over tokens and heads
// in an order that does not depend on the number of threads.
void qk_norm_backward(Exec& ex, TensorView dqkv_TH, const QkWeightGradients& dw, ConstTensorView x_TP,
                      ConstTensorView rstd_TN, const QkWeights& weights, AttentionShape shape);

}  // namespace upmoe::ops
