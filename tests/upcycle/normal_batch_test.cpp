// Normal numbers in bulk: against the definition in double, and whether they are normal.

#include "kernels/core/normal_batch.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <numbers>
#include <vector>

#include "kernels/core/philox.h"

namespace upmoe {
namespace {

std::vector<float> numbers(std::uint64_t key, std::uint64_t first, std::int64_t count) {
  std::vector<float> out(static_cast<std::size_t>(count));
  normal_batch(key, first, count, out.data());
  return out;
}

// The header's definition, word by word.
double by_definition(std::uint64_t key, std::uint64_t i) {
  const std::uint64_t group = i / 64, word = i % 64 / 16, lane = i % 16;
  const Philox4 c = philox(key, 16 * group + lane);
  const double u = (static_cast<float>(c[word & 2] >> 1) + 0.5f) * 0x1p-31f;  // rounded to fp32
  const double angle = 2 * std::numbers::pi * c[(word & 2) + 1] * 0x1p-32;
  const double radius = std::sqrt(-2 * std::log(u));
  return radius * (word % 2 == 0 ? std::cos(angle) : std::sin(angle));
}

TEST(NormalBatch, FollowsItsDefinition) {
  for (const std::uint64_t first :
       {std::uint64_t{0}, std::uint64_t{1} << 38, (std::uint64_t{1} << 40) + 64}) {
    const std::vector<float> z = numbers(42, first, 100'000);
    for (std::size_t i = 0; i < z.size(); ++i) {
      ASSERT_NEAR(z[i], by_definition(42, first + i), 3e-6) << first + i;
    }
  }
}

TEST(NormalBatch, DoesNotDependOnTheRangeAskedFor) {
  const std::vector<float> whole = numbers(7, 0, 1000);
  for (std::size_t first = 0; first < 200; first += 7) {
    for (const std::size_t count : {1u, 3u, 63u, 64u, 65u, 130u, 500u}) {
      const std::vector<float> part = numbers(7, first, static_cast<std::int64_t>(count));
      for (std::size_t i = 0; i < count; ++i) {
        ASSERT_EQ(std::bit_cast<std::uint32_t>(part[i]), std::bit_cast<std::uint32_t>(whole[first + i]))
            << first << " " << i;
      }
    }
  }
}

// Values another compiler, processor or set of flags must reproduce to the bit.
TEST(NormalBatch, IsTheSameOnEveryMachine) {
  std::uint64_t hash = 0;
  for (std::uint64_t block = 0; block < 64; ++block) {
    for (const float z : numbers(9, block * 2048, 2048))
      hash = hash * 1099511628211ull ^ std::bit_cast<std::uint32_t>(z);
  }
  EXPECT_EQ(hash, 10932367171933514256ull);
}

TEST(NormalBatch, HasTheMomentsOfANormalDistribution) {
  const std::vector<float> z = numbers(3, 0, 1 << 22);
  double sum = 0, square = 0, cube = 0, fourth = 0, neighbours = 0;
  for (std::size_t i = 0; i < z.size(); ++i) {
    const double v = z[i];
    sum += v;
    square += v * v;
    cube += v * v * v;
    fourth += v * v * v * v;
    if (i > 0) neighbours += v * z[i - 1];
  }
  const auto n = static_cast<double>(z.size());
  const double sigma = 1 / std::sqrt(n);  // of the mean; below: of the moments, 4 sigma each
  EXPECT_NEAR(sum / n, 0, 4 * sigma);
  EXPECT_NEAR(square / n, 1, 4 * std::sqrt(2.0) * sigma);
  EXPECT_NEAR(cube / n, 0, 4 * std::sqrt(15.0) * sigma);
  EXPECT_NEAR(fourth / n, 3, 4 * std::sqrt(96.0) * sigma);
  EXPECT_NEAR(neighbours / n, 0, 4 * sigma);
}

TEST(NormalBatch, HasTheTailsOfANormalDistribution) {
  const std::vector<float> z = numbers(11, 0, 1 << 24);
  for (const double bound : {2.0, 3.0, 4.0, 5.0}) {
    const double expected = std::erfc(bound / std::numbers::sqrt2) * static_cast<double>(z.size());
    const auto found = std::count_if(z.begin(), z.end(), [&](float v) { return std::abs(v) > bound; });
    EXPECT_NEAR(static_cast<double>(found), expected, 4 * std::sqrt(expected) + 1) << "beyond " << bound;
  }
}

TEST(NormalBatch, PassesKolmogorovSmirnov) {
  std::vector<float> z = numbers(5, 12345, 1 << 20);
  std::sort(z.begin(), z.end());
  double largest = 0;
  for (std::size_t i = 0; i < z.size(); ++i) {
    const double cdf = 0.5 * std::erfc(-double{z[i]} / std::numbers::sqrt2);
    const auto n = static_cast<double>(z.size());
    largest = std::max({largest, std::abs(cdf - static_cast<double>(i) / n),
                        std::abs(cdf - static_cast<double>(i + 1) / n)});
  }
  EXPECT_LT(largest * std::sqrt(static_cast<double>(z.size())), 1.95);  // exceeded once in a thousand samples
}

TEST(NormalBatch, StreamsOfDifferentKeysAreUnrelated) {
  const std::vector<float> a = numbers(philox_key(1, "layers.0"), 0, 1 << 20),
                           b = numbers(philox_key(1, "layers.1"), 0, 1 << 20);
  double product = 0;
  for (std::size_t i = 0; i < a.size(); ++i) product += double{a[i]} * b[i];
  EXPECT_LT(std::abs(product) / std::sqrt(static_cast<double>(a.size())), 4.0);
}

}  // namespace
}  // namespace upmoe
