// Balanced clusters of neurons against all ways to make them, and by hand.

#include "upcycle/clustering.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <random>

namespace upmoe {
namespace {

std::int64_t total(const std::vector<std::int64_t>& cost_RG, const std::vector<std::int32_t>& group_of_row,
                   std::int64_t groups) {
  std::int64_t sum = 0;
  for (std::size_t r = 0; r < group_of_row.size(); ++r)
    sum += cost_RG[r * static_cast<std::size_t>(groups) + static_cast<std::size_t>(group_of_row[r])];
  return sum;
}

// The least total over all assignments.
std::int64_t least(const std::vector<std::int64_t>& cost_RG, std::int64_t groups, std::int64_t size) {
  std::vector<std::int32_t> group_of_row;
  for (std::int32_t g = 0; g < groups; ++g)
    group_of_row.insert(group_of_row.end(), static_cast<std::size_t>(size), g);
  std::int64_t best = std::numeric_limits<std::int64_t>::max();
  do {
    best = std::min(best, total(cost_RG, group_of_row, groups));
  } while (std::next_permutation(group_of_row.begin(), group_of_row.end()));
  return best;
}

TEST(BalancedAssignment, IsTheCheapestOfAll) {
  std::mt19937 random(5);
  for (const auto& [groups, size] : {std::pair{1, 4}, {2, 3}, {2, 5}, {3, 2}, {3, 3}, {4, 2}, {8, 1}}) {
    for (int round = 0; round < 10; ++round) {
      std::vector<std::int64_t> cost_RG(static_cast<std::size_t>(groups * size * groups));
      for (std::int64_t& c : cost_RG)
        c = static_cast<std::int64_t>(random() % (round % 2 == 0 ? 1000 : 4)) - 2;
      const auto found = balanced_assignment(cost_RG, groups, size);
      for (std::int32_t g = 0; g < groups; ++g) ASSERT_EQ(std::count(found.begin(), found.end(), g), size);
      ASSERT_EQ(total(cost_RG, found, groups), least(cost_RG, groups, size)) << groups << " of " << size;
      ASSERT_EQ(found, balanced_assignment(cost_RG, groups, size));
    }
  }
}

// Neurons 0 and 5 are active at every token; 1, 3, 7 at the even ones and 2, 4, 6 at the odd ones, 7 and 6 least often.
TEST(Clusters, NeuronsThatAreActiveTogetherAreOneExpert) {
  ActiveNeurons active{8, 5, {}};
  for (int t = 0; t < 20; ++t) {
    const std::vector<std::int32_t> even{0, 5, 1, 3, t < 10 ? 7 : 1}, odd{0, 5, 2, 4, t < 8 ? 6 : 2};
    for (std::int32_t neuron : t % 2 == 0 ? even : odd) active.lists.push_back(neuron);
  }
  const Clusters found = cluster_neurons(active, 2, 2);
  EXPECT_EQ(std::vector<std::int32_t>(found.order.begin(), found.order.begin() + 2),
            (std::vector<std::int32_t>{0, 5}));
  const std::vector<std::int32_t> first(found.order.begin() + 2, found.order.begin() + 5),
      second(found.order.begin() + 5, found.order.end());
  const std::vector<std::int32_t> evens{1, 3, 7}, odds{2, 4, 6};
  EXPECT_TRUE((first == evens && second == odds) || (first == odds && second == evens));
  for (const std::int32_t neuron : found.representatives) EXPECT_TRUE(neuron != 7 && neuron != 6) << neuron;
}

// Of random lists: a partition, the shared ones the most often active, representatives by the plain distance.
TEST(Clusters, FollowTheirDefinition) {
  constexpr std::int64_t kNeurons = 26, kPerToken = 6, kShared = 2, kExperts = 4, kWidth = 6, kTokens = 50;
  ActiveNeurons active{kNeurons, kPerToken, {}};
  std::mt19937 random(7);
  std::vector<std::vector<double>> marker(kNeurons, std::vector<double>(kTokens, 0.0));
  for (std::int64_t t = 0; t < kTokens; ++t) {
    std::vector<std::int32_t> all(kNeurons);
    std::iota(all.begin(), all.end(), 0);
    std::shuffle(all.begin(), all.end(), random);
    for (std::int64_t k = 0; k < kPerToken; ++k) {
      const std::int32_t neuron = all[static_cast<std::size_t>(k)];
      active.lists.push_back(neuron);
      marker[static_cast<std::size_t>(neuron)][static_cast<std::size_t>(t)] = 1;
    }
  }
  const Clusters found = cluster_neurons(active, kShared, kExperts);
  std::vector<std::int32_t> sorted = found.order;
  std::sort(sorted.begin(), sorted.end());
  for (std::int32_t i = 0; i < kNeurons; ++i) ASSERT_EQ(sorted[static_cast<std::size_t>(i)], i);
  const auto count = [&](std::int32_t n) {
    const auto& m = marker[static_cast<std::size_t>(n)];
    return std::accumulate(m.begin(), m.end(), 0.0);
  };
  for (std::size_t i = kShared; i < kNeurons; ++i) EXPECT_LE(count(found.order[i]), count(found.order[1]));
  for (std::size_t e = 0; e < kExperts; ++e) {
    const auto begin = found.order.begin() + kShared + static_cast<std::ptrdiff_t>(e) * kWidth;
    const std::vector<std::int32_t> members(begin, begin + kWidth);
    const auto far = [&](std::int32_t n) {
      double sum = 0;
      for (std::size_t t = 0; t < kTokens; ++t) {
        double mean = 0;
        for (const std::int32_t m : members) mean += marker[static_cast<std::size_t>(m)][t] / kWidth;
        sum += std::abs(mean - marker[static_cast<std::size_t>(n)][t]);
      }
      return sum;
    };
    ASSERT_NE(std::find(members.begin(), members.end(), found.representatives[e]), members.end());
    for (const std::int32_t m : members) EXPECT_LE(far(found.representatives[e]), far(m) + 1e-9);
  }
  // Each group is that of a seed, the most often active of all that are not shared, and no two neurons of different
  // groups would lie nearer to their seeds in each other's place.
  std::vector<std::int32_t> seeds(found.order.begin() + kShared, found.order.end());
  std::sort(seeds.begin(), seeds.end());
  std::stable_sort(seeds.begin(), seeds.end(), [&](auto a, auto b) { return count(a) > count(b); });
  const auto distance = [&](std::int32_t a, std::size_t group) {
    double sum = 0;
    for (std::size_t t = 0; t < kTokens; ++t)
      sum += std::abs(marker[static_cast<std::size_t>(a)][t] -
                      marker[static_cast<std::size_t>(seeds[group])][t]);
    return sum;
  };
  for (std::size_t i = kShared; i < kNeurons; ++i)
    for (std::size_t j = kShared; j < kNeurons; ++j) {
      const std::size_t of_i = (i - kShared) / kWidth, of_j = (j - kShared) / kWidth;
      const std::int32_t a = found.order[i], b = found.order[j];
      EXPECT_LE(distance(a, of_i) + distance(b, of_j), distance(a, of_j) + distance(b, of_i))
          << a << " and " << b;
    }
}

}  // namespace
}  // namespace upmoe
