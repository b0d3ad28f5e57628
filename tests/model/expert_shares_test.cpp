#include "trainer/model/expert_shares.h"

#include <gtest/gtest.h>

#include <set>

namespace upmoe {
namespace {

// Every piece of every expert has one rank: the one along ep that has the expert, along etp that has the part.
TEST(ExpertShares, PiecesAreNumberedByTheirRank) {
  for (const std::int64_t experts : {1, 5, 13, 60})
    for (int ep = 1; ep <= 8; ++ep)  // more than experts, too: some ranks have none
      for (const int etp : {1, 2, 3, 4}) {
        const ExpertShares shares{experts, etp};
        const int ranks = ep * etp;
        const std::vector<std::int32_t> numbers = shares.numbers(ranks);
        EXPECT_EQ(std::set<std::int32_t>(numbers.begin(), numbers.end()).size(),
                  static_cast<std::size_t>(experts * etp));
        for (int r = 0; r < ranks; ++r) {
          const Range mine = shares.pieces_of(r, ranks), local = balanced(experts, ep, r / etp);
          EXPECT_EQ(mine.size(), local.size());
          for (std::int64_t e = local.begin; e < local.end; ++e)
            EXPECT_EQ(numbers[static_cast<std::size_t>(e * etp + r % etp)], mine.begin + e - local.begin);
          if (r > 0) {
            EXPECT_EQ(shares.pieces_of(r - 1, ranks).end, mine.begin);
          }
        }
      }
}

// Three experts on eight ranks lie on ranks 2, 5 and 7.
TEST(ExpertShares, NodesWithoutExpertsAreNotCounted) {
  const ExpertShares shares{3, 1};
  EXPECT_EQ(node_begins(shares, 8, 2), (std::vector<std::int64_t>{0, 0, 1, 2, 3}));
  EXPECT_EQ(nodes_with_experts(node_begins(shares, 8, 2)), 3);
  EXPECT_EQ(nodes_with_experts(node_begins(shares, 8, 4)), 2);
  EXPECT_EQ(node_map(shares, 8, 2, 0).pieces(), 0);
  EXPECT_EQ(node_map(shares, 8, 2, 0).nodes, 3);
  EXPECT_EQ(node_map(shares, 8, 2, 1).pieces(), 1);
}

}  // namespace
}  // namespace upmoe
