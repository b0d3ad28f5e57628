#pragma once
// How far an op may stray from its double reference.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "kernels/core/tensor.h"

namespace upmoe::test {

// Half of a last place: the share by which a rounding moves a value at the most.
inline constexpr double kUnit = 1.0 / (1 << 24), kDoubleUnit = kUnit / (1 << 29);  // of fp32 and of double
inline constexpr double kBF16Unit = 1.0 / (1 << 8);

// By how much of its norm rounding moves what fp32 sums give, one behind the other, of so many terms in all: each
// rounding is one of a partial sum, which is no larger than what comes of it, and they do not know of each other.
inline double rounding_of_sums(double terms) {
  return std::sqrt(terms) * kUnit;
}

// Of the mean loss over twenty tokens or more, where sums behind the logits are rounded otherwise: each token's loss
// moves by its own twenty units or so (the standard deviation, for 1500 terms on both sides), their mean by a root of
// the number less; three and a half times that.
inline constexpr double kMeanLossRounding = 16 * kUnit;
// In bf16, of the small golden mixtures: by how much of a loss one rank's is from fp32's, in the root mean square over
// models and steps (a token whose experts change moves a mean of few tokens by that alone). A test of layouts holds it.
// Two runs that are rounded in other places differ by a root of two of it; three and a half times that.
inline constexpr double kLossMovedByBF16 = 1.3e-3, kMeanLossRoundingOfBF16 = 3.5 * 1.4142 * kLossMovedByBF16;

// |actual - expected| <= relative * |expected| + absolute * (largest |expected|).
struct Tolerance {
  double relative, absolute;
};

// One rounding of the result to the dtype, and fp32 sums.
inline Tolerance rounding_of(DType dtype) {
  return dtype == DType::kBF16 ? Tolerance{1.0 / 128, 1e-3} : Tolerance{1e-5, 2e-6};
}

inline void expect_close(const std::vector<double>& actual, const std::vector<double>& expected,
                         Tolerance tolerance, const std::string& name) {
  ASSERT_EQ(actual.size(), expected.size()) << name;
  double largest = 0;
  for (double e : expected) largest = std::max(largest, std::abs(e));
  std::size_t worst = 0;
  double worst_share = -1;  // of what is allowed
  for (std::size_t i = 0; i < actual.size(); ++i) {
    const double allowed = tolerance.relative * std::abs(expected[i]) + tolerance.absolute * largest + 1e-30;
    const double error = std::abs(actual[i] - expected[i]);
    const double share = std::isnan(error) ? INFINITY : error / allowed;
    if (share > worst_share) worst = i, worst_share = share;
  }
  if (actual.empty()) return;
  EXPECT_LE(worst_share, 1.0) << name << "[" << worst << "] is " << actual[worst] << ", expected "
                              << expected[worst];
}

// |found - expected| / |expected|, in the norm of the whole; `floor` stands in for the norm of what is zero
// but for rounding. Infinite where the sizes differ or a value is none.
inline double relative_distance(const std::vector<float>& expected, const std::vector<float>& found,
                                double floor = 0) {
  if (expected.size() != found.size()) return INFINITY;
  double difference = 0, norm = 0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    difference += std::pow(double(found[i]) - double(expected[i]), 2);
    norm += std::pow(double(expected[i]), 2);
  }
  const double distance = std::sqrt(difference) / std::max(std::sqrt(norm), floor);
  return std::isnan(distance) ? INFINITY : distance;
}

}  // namespace upmoe::test
