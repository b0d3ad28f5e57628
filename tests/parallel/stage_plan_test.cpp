#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <limits>

#include "kernels/core/philox.h"
#include "parallel/stage_plan.h"

namespace upmoe {
namespace {

double largest(const StagePlan& plan, const std::vector<double>& cost, double first, double last) {
  double worst = 0;
  for (const Range& r : plan.chunks) {
    double sum = r.begin == 0 ? first : 0;
    if (r.end == static_cast<std::int64_t>(cost.size())) sum += last;
    for (std::int64_t i = r.begin; i < r.end; ++i) sum += cost[static_cast<std::size_t>(i)];
    worst = std::max(worst, sum);
  }
  return worst;
}

// The smallest possible largest chunk, by trying every cut.
double best_possible(const std::vector<double>& cost, double first, double last, std::size_t chunks) {
  const std::size_t n = cost.size();
  const std::function<double(std::size_t, std::size_t)> best = [&](std::size_t begin, std::size_t left) {
    double sum = begin == 0 ? first : 0, found = std::numeric_limits<double>::infinity();
    for (std::size_t end = begin + 1; end + left - 1 <= n; ++end) {
      sum += cost[end - 1];
      if (left > 1) {
        found = std::min(found, std::max(sum, best(end, left - 1)));
      } else if (end == n) {
        found = sum + last;
      }
    }
    return found;
  };
  return best(0, chunks);
}

TEST(StagePlan, LargestChunkIsAsSmallAsPossible) {
  for (std::uint64_t seed = 0; seed < 300; ++seed) {
    std::uint64_t next = 0;
    const auto dice = [&](std::uint32_t n) { return philox(seed, next++)[0] % n; };
    std::vector<double> cost(1 + dice(9));
    for (double& c : cost) c = 1.0 + dice(7);
    const double first = dice(4), last = dice(9);
    const int stages = 1 + static_cast<int>(dice(static_cast<std::uint32_t>(cost.size())));
    const int each =
        1 +
        static_cast<int>(dice(static_cast<std::uint32_t>(cost.size()) / static_cast<std::uint32_t>(stages)));
    const StagePlan plan = plan_stages(stages, stages == 1 ? 1 : each, cost, first, last);
    std::int64_t at = 0;
    for (const Range& r : plan.chunks) {
      EXPECT_EQ(r.begin, at);
      EXPECT_GT(r.size(), 0);
      at = r.end;
    }
    EXPECT_EQ(at, static_cast<std::int64_t>(cost.size()));
    EXPECT_EQ(largest(plan, cost, first, last), best_possible(cost, first, last, plan.chunks.size())) << seed;
  }
}

TEST(StagePlan, AHeavyHeadLeavesItsStageFewerBlocks) {
  const StagePlan plan = plan_stages(2, 1, std::vector<double>(8, 1.0), 0, 4);
  EXPECT_EQ(plan.chunks, (std::vector<Range>{{0, 6}, {6, 8}}));
  EXPECT_EQ(plan.stage_of_block(5), 0);
  EXPECT_EQ(plan.stage_of_block(6), 1);
  EXPECT_THROW(plan.stage_of_block(8), Error);
}

TEST(StagePlan, InterleavedChunksTakeTurns) {
  const StagePlan plan = plan_stages(2, 2, std::vector<double>(4, 1.0), 0, 0);
  EXPECT_EQ(describe(plan), "stage 0: blocks 0, 2 (50.0 %); stage 1: blocks 1, 3 (50.0 %)");
  for (int block = 0; block < 4; ++block) EXPECT_EQ(plan.stage_of_block(block), block % 2);
}

TEST(StagePlan, RefusesMoreChunksThanBlocks) {
  EXPECT_THROW(plan_stages(3, 1, std::vector<double>(2, 1.0), 0, 0), Error);
  EXPECT_THROW(plan_stages(2, 2, std::vector<double>(3, 1.0), 0, 0), Error);
}

}  // namespace
}  // namespace upmoe
