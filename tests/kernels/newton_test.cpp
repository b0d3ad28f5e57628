// Roots and reciprocals of fused multiply-adds, against double: over every exponent, every fraction of two of them, and
// at the ends of what they are for. That a GPU has the same bits, adamw8bit_test shows.

#include "kernels/ops/newton.h"

#include <gtest/gtest.h>

#include <limits>

#include "kernels/ops/moment_codes.h"

namespace upmoe {
namespace {

constexpr double kBound = 1.0 / (1 << 23);

float of_bits(std::uint32_t bits) {
  return std::bit_cast<float>(bits);
}

double root_error(float x) {
  return std::abs(static_cast<double>(newton_root(x)) / std::sqrt(static_cast<double>(x)) - 1);
}
double reciprocal_error(float x) {
  return std::abs(static_cast<double>(newton_reciprocal(x)) * static_cast<double>(x) - 1);
}

// The largest error over [from, to) in steps of `step` of a number's bits. NaN is larger than any.
template <class Error>
double largest(std::uint32_t from, std::uint32_t to, std::uint32_t step, const Error& error) {
  double most = 0;
  for (std::uint64_t bits = from; bits < to; bits += step) {
    const double e = error(of_bits(static_cast<std::uint32_t>(bits)));
    if (!(e <= most)) most = e;
  }
  return most;
}

constexpr std::uint32_t kOne = 0x3f800000, kTwo = 0x40000000, kFour = 0x40800000, kLeastNormal = 0x00800000,
                        kInfinity = 0x7f800000, kMostInverted = 0x7e000000;  // 2^125

TEST(Newton, RootOfEveryFraction) {
  EXPECT_LE(largest(kOne, kFour, 1, root_error), kBound);
}
TEST(Newton, RootOfEveryExponent) {
  EXPECT_LE(largest(kLeastNormal, kInfinity, 997, root_error), kBound);
  EXPECT_LE(root_error(of_bits(kLeastNormal)), kBound);
  EXPECT_LE(root_error(std::numeric_limits<float>::max()), kBound);
}
TEST(Newton, RootOfNothingAndNextToIt) {
  EXPECT_EQ(newton_root(0.0f), 0.0f);
  EXPECT_LE(
      largest(1, kLeastNormal, 97,
              [](float x) {
                return std::abs(static_cast<double>(newton_root(x)) - std::sqrt(static_cast<double>(x)));
              }),
      std::ldexp(1.0, -63));
  EXPECT_TRUE(std::isnan(newton_root(std::numeric_limits<float>::quiet_NaN())));
}

TEST(Newton, ReciprocalOfEveryFraction) {
  EXPECT_LE(largest(kOne, kTwo, 1, reciprocal_error), kBound);
}
TEST(Newton, ReciprocalOfEveryExponent) {
  EXPECT_LE(largest(kLeastNormal, kMostInverted + 1, 997, reciprocal_error), kBound);
  EXPECT_LE(reciprocal_error(of_bits(kMostInverted)), kBound);
}

// What a block is multiplied by, from the least normal number to the largest.
TEST(Newton, InverseOfScale) {
  const auto error = [](float x) {
    return std::abs(static_cast<double>(inverse_of_scale(x)) * static_cast<double>(x) - 1);
  };
  EXPECT_LE(largest(kLeastNormal, 0x7e800000, 997, error), kBound);
  EXPECT_LE(largest(0x7e800000, kInfinity, 997, error), 1.0 / (1 << 20)) << "of what has denormal inverses";
  EXPECT_EQ(inverse_of_scale(0.0f), 0.0f);
  EXPECT_EQ(inverse_of_scale(1e-40f), 0.0f);
  EXPECT_EQ(inverse_of_scale(std::numeric_limits<float>::infinity()), 0.0f);
}

}  // namespace
}  // namespace upmoe
