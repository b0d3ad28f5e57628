#pragma once
// Matrix products, sums, embedding and AdamW once more, naive and in double, with what their rounding may cost.

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "kernels/ops/adamw.h"
#include "kernels/ops/gemm.h"
#include "tests/support/test_device.h"

namespace upmoe::test {

// Sums in exact-enough arithmetic, and of each the sum of the absolute values of its terms.
struct ReferenceSums {
  std::vector<double> value, magnitude, product;  // product: without what it is added to
  std::int64_t terms = 0;                         // the most in any of them
};

struct MatrixProduct {
  std::int64_t m, n, k;
  Transpose transpose_a = Transpose::kNo, transpose_b = Transpose::kNo;
  std::size_t a_at(std::int64_t i, std::int64_t j) const {
    return static_cast<std::size_t>(transpose_a == Transpose::kNo ? i * k + j : j * m + i);
  }
  std::size_t b_at(std::int64_t i, std::int64_t j) const {
    return static_cast<std::size_t>(transpose_b == Transpose::kNo ? i * n + j : j * k + i);
  }
};

// c + op(a) op(b); c may be empty for zeros.
inline ReferenceSums reference_gemm(const MatrixProduct& p, const double* a, const double* b,
                                    const std::vector<double>& c = {}) {
  ReferenceSums out;
  out.terms = p.k + 1;
  for (std::int64_t i = 0; i < p.m; ++i)
    for (std::int64_t j = 0; j < p.n; ++j) {
      double sum = c.empty() ? 0.0 : c[static_cast<std::size_t>(i * p.n + j)], magnitude = std::abs(sum);
      for (std::int64_t k = 0; k < p.k; ++k) {
        const double term = a[p.a_at(i, k)] * b[p.b_at(k, j)];
        sum += term;
        magnitude += std::abs(term);
      }
      out.value.push_back(sum);
      out.magnitude.push_back(magnitude);
      if (!c.empty()) out.product.push_back(sum - c[static_cast<std::size_t>(i * p.n + j)]);
    }
  return out;
}

// A sum of n terms in fp32, in any order, strays by at most about n 2^-24 times the sum of their absolute
// values (Higham, Accuracy and Stability, 4.2); rounding the result to bf16 adds 2^-8 of it. Two roundings of
// slack: the products, and an fp32 store. A GPU's library may round a product to bf16 before it adds to it.
inline void expect_sums(const std::vector<double>& actual, const ReferenceSums& expected, DType out,
                        const std::string& name) {
  ASSERT_EQ(actual.size(), expected.value.size()) << name;
  const double per_term = std::ldexp(1.0, -24), rounding = out == DType::kBF16 ? std::ldexp(1.0, -8) : 0.0;
  for (std::size_t i = 0; i < actual.size(); ++i) {
    const double sum_error = static_cast<double>(expected.terms + 2) * per_term * expected.magnitude[i];
    double allowed = sum_error + rounding * (std::abs(expected.value[i]) + sum_error);
    if (on_gpu() && !expected.product.empty()) allowed += rounding * std::abs(expected.product[i]);
    // Negated, so that NaN fails.
    if (!(std::abs(actual[i] - expected.value[i]) <= allowed))
      FAIL() << name << "[" << i << "] is " << actual[i] << ", expected " << expected.value[i] << " +- "
             << allowed;
  }
}

// One AdamW step of one number, as torch.optim.AdamW writes it.
inline void reference_adamw(double& weight, double& m, double& v, double grad, const AdamWStep& s) {
  const double b1 = s.beta1, b2 = s.beta2, g = grad * s.grad_scale;
  weight *= 1 - static_cast<double>(s.lr) * s.weight_decay;
  m = b1 * m + (1 - b1) * g;
  v = b2 * v + (1 - b2) * g * g;
  const double bias1 = 1 - std::pow(b1, s.step), bias2 = 1 - std::pow(b2, s.step);
  weight -= s.lr / bias1 * m / (std::sqrt(v) / std::sqrt(bias2) + s.eps);
}

}  // namespace upmoe::test
