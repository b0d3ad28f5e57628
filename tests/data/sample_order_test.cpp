// The order of samples: each sequence once per epoch, shares within one.

#include "data/sample_order.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>

#include "kernels/core/check.h"

namespace upmoe {
namespace {

TEST(SampleOrder, PermutedIsABijection) {
  for (const std::int64_t n : {1, 2, 3, 5, 16, 17, 100, 1000, 4096, 4097}) {
    std::set<std::int64_t> seen;
    for (std::int64_t i = 0; i < n; ++i) {
      const std::int64_t p = permuted(i, n, 42);
      ASSERT_TRUE(p >= 0 && p < n);
      seen.insert(p);
    }
    EXPECT_EQ(static_cast<std::int64_t>(seen.size()), n);
  }
  const std::int64_t large = std::int64_t{1} << 50;  // no table: as quick as a small one
  for (std::int64_t i : {std::int64_t{0}, large / 3, large - 1}) {
    const std::int64_t p = permuted(i, large, 42);
    EXPECT_TRUE(p >= 0 && p < large);
  }
}

// Each place equally often, and neighbours not kept together.
TEST(SampleOrder, PermutedMixes) {
  constexpr std::int64_t kN = 50, kKeys = 4000;
  std::vector<int> first(kN, 0);
  int neighbours = 0;
  for (std::uint64_t key = 0; key < kKeys; ++key) {
    const std::int64_t a = permuted(0, kN, key), b = permuted(1, kN, key);
    ++first[static_cast<std::size_t>(a)];
    neighbours += b == a + 1 ? 1 : 0;
  }
  double chi_square = 0;
  for (int count : first) chi_square += (count - 80.0) * (count - 80.0) / 80.0;
  EXPECT_LT(chi_square, 100.0);            // 49 degrees of freedom: 1 in 40,000 exceeds 100
  EXPECT_NEAR(neighbours, 80 * 0.98, 45);  // 49 of 50 * 49 pairs; 5 standard deviations
}

TEST(SampleOrder, EverySequenceOncePerEpochAndAnewInEach) {
  const SampleOrder order({100, 37}, {3.0, 1.0}, true, 9);
  std::vector<std::vector<std::vector<std::int64_t>>> seen(2);  // source, epoch
  for (std::int64_t i = 0; i < 800; ++i) {
    const SampleOrder::Place p = order.at(i);
    auto& epochs = seen[static_cast<std::size_t>(p.source)];
    if (static_cast<std::size_t>(p.epoch) >= epochs.size()) epochs.emplace_back();
    epochs[static_cast<std::size_t>(p.epoch)].push_back(p.sequence);
  }
  ASSERT_EQ(seen[0].size(), 6u);
  EXPECT_NE(seen[0][0], seen[0][1]);
  for (std::size_t source = 0; source < 2; ++source) {
    const std::size_t n = source == 0 ? 100 : 37;
    for (std::size_t epoch = 0; epoch + 1 < seen[source].size(); ++epoch) {
      std::vector<std::int64_t> sorted = seen[source][epoch];
      std::sort(sorted.begin(), sorted.end());
      ASSERT_EQ(sorted.size(), n);
      for (std::size_t i = 0; i < n; ++i) ASSERT_EQ(sorted[i], static_cast<std::int64_t>(i));
    }
  }
}

TEST(SampleOrder, SharesWithinOne) {
  const std::vector<std::vector<double>> mixes = {{1},
                                                  {1, 1},
                                                  {0.7, 0.3},
                                                  {1, 2, 3},
                                                  {5, 1, 1},
                                                  {1, 1, 1, 1, 1},
                                                  {0.01, 0.33, 0.66},
                                                  {97, 1, 1, 1},
                                                  {8, 5, 3, 2, 1, 1},
                                                  {0.123, 0.456, 0.421}};
  for (const auto& weights : mixes) {
    const double sum = std::accumulate(weights.begin(), weights.end(), 0.0);
    const SampleOrder order(std::vector<std::int64_t>(weights.size(), 1000), weights, false, 1);
    std::vector<std::int64_t> count(weights.size(), 0);
    for (std::int64_t i = 0; i < 20000; ++i) {
      const SampleOrder::Place p = order.at(i);
      auto& turn = count[static_cast<std::size_t>(p.source)];
      ASSERT_EQ(p.epoch * 1000 + p.sequence, turn);  // no gap: the next of that source
      ++turn;
      for (std::size_t k = 0; k < weights.size(); ++k) {
        const double share = static_cast<double>(i + 1) * weights[k] / sum;
        ASSERT_LT(std::abs(static_cast<double>(count[k]) - share), 1.0)
            << "source " << k << " after " << i + 1;
      }
    }
  }
}

// Weights without a short period are rounded to 1/65536 of all.
TEST(SampleOrder, OddWeights) {
  const std::vector<double> weights = {3.14159265358979, 2.71828182845905, 1.41421356237310};
  const SampleOrder order({10, 10, 10}, weights, false, 1);
  const double sum = weights[0] + weights[1] + weights[2];
  ASSERT_EQ(std::accumulate(order.parts().begin(), order.parts().end(), std::int64_t{0}), 65536);
  for (std::size_t k = 0; k < 3; ++k) {
    EXPECT_NEAR(static_cast<double>(order.parts()[k]), weights[k] / sum * 65536, 1.0);
  }
  EXPECT_THROW(SampleOrder({10, 10}, {1.0, 1e-7}, false, 1), Error);
  EXPECT_THROW(SampleOrder({10, 10}, {1.0, 0.0}, false, 1), Error);
  EXPECT_THROW(SampleOrder({10, 10}, {1.0, std::nan("")}, false, 1), Error);
}

}  // namespace
}  // namespace upmoe
