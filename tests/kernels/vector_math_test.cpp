#include "kernels/cpu/vector_math.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

namespace upmoe::cpu {
namespace {

float exp_of(float x) {
  return vector_exp(splat(x))[5];
}

double ulps(float actual, double expected) {
  const auto nearest = static_cast<float>(expected);
  const double ulp = static_cast<double>(std::nextafter(nearest, INFINITY)) - static_cast<double>(nearest);
  return std::abs(static_cast<double>(actual) - expected) / ulp;
}

TEST(VectorMath, ExpAgreesWithDouble) {
  double worst = 0;
  for (double x = -86.9; x < 88.7; x += 1.7e-4) {
    const auto x32 = static_cast<float>(x);
    worst = std::max(worst, ulps(exp_of(x32), std::exp(static_cast<double>(x32))));
  }
  for (double x = -1e-3; x < 1e-3; x += 1.1e-8) {
    const auto x32 = static_cast<float>(x);
    worst = std::max(worst, ulps(exp_of(x32), std::exp(static_cast<double>(x32))));
  }
  EXPECT_LT(worst, 1.5);
}

TEST(VectorMath, ExpAtTheEnds) {
  const float inf = std::numeric_limits<float>::infinity();
  EXPECT_EQ(exp_of(0.0f), 1.0f);  // the online softmax relies on it
  EXPECT_EQ(exp_of(-0.0f), 1.0f);
  EXPECT_EQ(exp_of(-inf), 0.0f);
  EXPECT_EQ(exp_of(-1e30f), 0.0f);
  EXPECT_EQ(exp_of(-88.0f), 0.0f);  // flushed
  EXPECT_GT(exp_of(-86.9f), 0.0f);
  EXPECT_EQ(exp_of(inf), inf);
  EXPECT_EQ(exp_of(88.8f), inf);
  EXPECT_LT(ulps(exp_of(88.72f), std::exp(static_cast<double>(88.72f))), 1.5);
  EXPECT_TRUE(std::isnan(exp_of(std::numeric_limits<float>::quiet_NaN())));
}

TEST(VectorMath, SigmoidAgreesWithDouble) {
  for (double x = -80; x < 80; x += 1e-3) {
    const auto x32 = static_cast<float>(x);
    const double expected = 1 / (1 + std::exp(-static_cast<double>(x32)));
    EXPECT_NEAR(static_cast<double>(vector_sigmoid(splat(x32))[0]), expected, 3e-7 * expected) << x;
  }
  EXPECT_EQ(vector_sigmoid(splat(-1000.0f))[3], 0.0f);
  EXPECT_EQ(vector_sigmoid(splat(1000.0f))[3], 1.0f);
}

TEST(Simd, Bf16RoundsAsTheScalarDoes) {
  std::vector<float> values{0.0f,    -0.0f,    1.0f,   1.00390625f, 1.01171875f,
                            3.4e38f, -3.4e38f, 1e-40f, INFINITY,    -INFINITY};
  std::uint32_t bits = 12345;
  for (int i = 0; i < 100000; ++i) {
    bits = bits * 1664525u + 1013904223u;
    values.push_back(std::bit_cast<float>(bits));
  }
  // Every upper half with what rounds down, up and to even. One that is infinity's makes a NaN that alone would be
  // infinity; a vector of them has subnormals in all of its lanes or in none.
  for (std::uint32_t upper = 0; upper < 0x10000u; ++upper)
    for (const std::uint32_t lower : {0u, 1u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu})
      values.push_back(std::bit_cast<float>(upper << 16 | lower));
  for_lanes(static_cast<std::int64_t>(values.size()), [&](std::int64_t i, auto lanes) {
    bf16 rounded[kLanes];
    store(rounded, load(values.data() + i, lanes), lanes);
    const f32x16 widened = rounded_to<bf16>(load(values.data() + i, lanes));
    for (std::int64_t j = 0; j < lanes.count; ++j) {
      const bf16 expected = to_bf16(values[static_cast<std::size_t>(i + j)]);
      ASSERT_EQ(rounded[j], expected) << values[static_cast<std::size_t>(i + j)];
      ASSERT_EQ(std::bit_cast<std::uint32_t>(widened[j]), std::uint32_t{expected.bits} << 16);
    }
  });
}

TEST(Simd, SumsOfAnyLength) {
  std::vector<float> ones(200, 1.0f);
  for (std::int64_t n = 0; n <= 200; ++n)
    EXPECT_EQ(sum_lanes(n, [&](std::int64_t i, auto lanes) { return load(ones.data() + i, lanes); }),
              static_cast<float>(n));
}

}  // namespace
}  // namespace upmoe::cpu
