#pragma once
// AdamW (Loshchilov & Hutter), decoupled decay, as torch.optim.AdamW computes it:
//   master *= 1 - lr*weight_decay;  m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2
//   master -= lr/bias1 * m / (sqrt(v)/sqrt(bias2) + eps),  bias_i = 1 - b_i^step

#include "kernels/core/exec.h"

namespace upmoe {
struct AdamWStep {
  float lr = 0, beta1 = 0.9f, beta2 = 0.95f, eps = 1e-8f, weight_decay = 0;
  std::int64_t step = 1;  // counts from 1
  float grad_scale = 1;   // the clip factor
};
}  // namespace upmoe

namespace upmoe::ops {

// Flat tensors of equal length. master, m, v: fp32; grad: fp32 or bf16; weight (fp32 or bf16) receives the
// rounded master and may be the master itself.
void adamw(Exec& ex, TensorView weight, TensorView master, TensorView m, TensorView v, ConstTensorView grad,
           const AdamWStep& step);

}  // namespace upmoe::ops
