#pragma once
// The numbers of noisy routing for one token and expert, the same text for every device.

#include <cmath>

#include "kernels/core/everywhere.h"
#include "kernels/ops/router_draws.h"

namespace upmoe {

// From a normal distribution, by Box and Muller: two columns share a pair of uniform numbers.
UPMOE_EVERYWHERE inline float router_normal(std::uint64_t key, std::uint64_t token, std::uint32_t layer,
                                            std::uint32_t column) {
  const std::uint32_t pair = column / 2 * 2;
  const float radius = std::sqrt(-2.0f * std::log(uniform_from_bits(router_bits(key, token, layer, pair))));
  const float angle = 6.2831853f * uniform_from_bits(router_bits(key, token, layer, pair + 1));
  return radius * (column % 2 == 0 ? std::cos(angle) : std::sin(angle));
}

// log(1 + exp(x)), of any x.
UPMOE_EVERYWHERE inline float softplus(float x) {
  return std::fmax(x, 0.0f) + std::log1p(std::exp(-std::fabs(x)));
}
// Its derivative.
UPMOE_EVERYWHERE inline float softplus_slope(float x) {
  return 1.0f / (1.0f + std::exp(-x));
}
// Of the normal distribution: the probability below x, and the density at x.
UPMOE_EVERYWHERE inline float normal_below(float x) {
  return 0.5f * std::erfc(-0.70710678f * x);
}
UPMOE_EVERYWHERE inline float normal_density(float x) {
  return 0.39894228f * std::exp(-0.5f * x * x);
}

// softplus does not reach 0, but fp32 does: no division by it.
constexpr float kLeastNoise = 1e-20f;

}  // namespace upmoe
