#pragma once
// The naive reference of kernels/ops/weight_order.h.

#include <cmath>

namespace upmoe::test {

// With 13 significant bits, halves away from zero.
inline double compared(double weight) {
  int exponent = 0;
  const double fraction = std::frexp(weight, &exponent);
  return std::ldexp(std::round(std::ldexp(fraction, 13)), exponent - 13);
}

}  // namespace upmoe::test
