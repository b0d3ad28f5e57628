// Sorting rows by expert, and where each expert's rows begin, over thousands of random routings: each row exactly once,
// rows of an expert in their tokens' order, experts without rows at the beginning, in the middle and at the end.

#include <gtest/gtest.h>

#include <random>

#include "kernels/ops/routing.h"
#include "tests/support/op_exec.h"
#include "tests/support/random_tensor.h"

namespace upmoe::test {
namespace {

TEST(RoutedOrder, EachRowOnceInOrder) {
  OpExec ex;
  std::mt19937 random(6);
  for (int trial = 0; trial < 3000; ++trial) {
    const auto tokens = static_cast<std::int64_t>(random() % 40),
               k = static_cast<std::int64_t>(1 + random() % 4),
               experts = static_cast<std::int64_t>(trial % 11 == 0 ? 60 : 1 + random() % 9);
    // Of three parts of the experts the first, the middle or the last is chosen by nobody, or all may be.
    std::vector<int> chosen;
    for (int e = 0; e < experts; ++e)
      if (trial % 4 == 3 || 3 * e / experts != trial % 4) chosen.push_back(e);
    if (chosen.empty() || trial % 7 == 0)
      chosen = {static_cast<int>(random() % static_cast<unsigned>(experts))};
    HostTensor index({tokens, k}, DType::kI32), order({tokens * k}, DType::kI32),
        slot({tokens, k}, DType::kI32), counts({experts}, DType::kI32), offsets({experts + 1}, DType::kI32);
    std::int64_t rows = 0;  // of those that have an expert
    for (std::size_t i = 0; i < index.size(); ++i) {
      const bool none = trial % 5 == 0 && random() % 4 == 0;
      index.set(i, none ? -1 : chosen[random() % chosen.size()]);
      rows += none ? 0 : 1;
    }
    ops::sort_by_expert(ex, order, slot, counts, index);
    ops::row_offsets(ex, offsets, counts);
    finish_ops();
    std::vector<int> seen(index.size());
    ASSERT_EQ(offsets.get(0), 0);
    for (std::size_t e = 0; e < counts.size(); ++e) {
      double before = -1;  // the last row of this expert
      for (auto at = static_cast<std::size_t>(offsets.get(e));
           at < static_cast<std::size_t>(offsets.get(e + 1)); ++at) {
        const double row = order.get(at);
        ASSERT_GT(row, before) << "expert " << e << " of routing " << trial;
        before = row;
        const auto i = static_cast<std::size_t>(row);
        ASSERT_LT(i, index.size());
        ASSERT_EQ(index.get(i), static_cast<double>(e));
        ASSERT_EQ(slot.get(i), static_cast<double>(at));
        ++seen[i];
      }
    }
    ASSERT_EQ(offsets.get(counts.size()), static_cast<double>(rows));
    for (std::size_t i = 0; i < seen.size(); ++i) {
      ASSERT_EQ(seen[i], index.get(i) < 0 ? 0 : 1) << "row " << i << " of routing " << trial;
      ASSERT_TRUE(index.get(i) >= 0 || slot.get(i) == -1) << "row " << i << " of routing " << trial;
    }
  }
}

}  // namespace
}  // namespace upmoe::test
