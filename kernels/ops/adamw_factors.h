#pragma once
// The constants of an AdamW step for the backends, taken in fp64 and rounded once, as PyTorch does.

#include <cmath>

#include "kernels/ops/adamw.h"

namespace upmoe {

struct AdamWFactors {
  float keep, beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, inverse_sqrt_bias2, eps, grad_scale;

  explicit AdamWFactors(const AdamWStep& s) {
    const double b1 = s.beta1, b2 = s.beta2, count = static_cast<double>(s.step);
    keep = static_cast<float>(1.0 - static_cast<double>(s.lr) * s.weight_decay);
    beta1 = s.beta1;
    one_minus_beta1 = static_cast<float>(1.0 - b1);
    beta2 = s.beta2;
    one_minus_beta2 = static_cast<float>(1.0 - b2);
    step_size = static_cast<float>(s.lr / (1.0 - std::pow(b1, count)));
    inverse_sqrt_bias2 = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(b2, count)));
    eps = s.eps;
    grad_scale = s.grad_scale;
  }
};

}  // namespace upmoe
