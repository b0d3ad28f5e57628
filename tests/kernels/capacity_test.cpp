#include "kernels/ops/capacity.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "tests/support/compared_weight.h"
#include "tests/support/drawn.h"
#include "tests/support/op_exec.h"
#include "tests/support/random_tensor.h"
#include "tests/support/reference_model.h"

namespace upmoe::test {
namespace {

struct Case {
  std::int64_t tokens, experts, k, pool, capacity;
  bool weighed;
};

// Different experts of every token, the low ones far more often; one in nine is none. Few different weights but for
// rounding: ties.
struct Drawn {
  HostTensor index, weight, row;  // row: of each place
};
Drawn draw(const Case& c, std::uint64_t seed) {
  Drawn d{HostTensor({c.tokens, c.k}, DType::kI32), HostTensor({c.tokens, c.k}, DType::kF32),
          HostTensor({c.tokens}, DType::kI32)};
  const std::vector<std::int64_t> rows = shuffled(c.tokens, seed);
  for (std::int64_t t = 0; t < c.tokens; ++t) {
    d.row.set(static_cast<std::size_t>(t), static_cast<double>(rows[static_cast<std::size_t>(t)]));
    std::vector<std::int64_t> experts = shuffled(c.experts, seed + 7 + static_cast<std::uint64_t>(t));
    if (t % 3 != 0) std::sort(experts.begin(), experts.end());
    for (std::int64_t j = 0; j < c.k; ++j) {
      const auto at = static_cast<std::size_t>(t * c.k + j);
      d.index.set(at, drawn(seed + 1, at) % 9 == 0
                          ? -1.0
                          : static_cast<double>(experts[static_cast<std::size_t>(j)]));
      d.weight.set(at, static_cast<double>(drawn(seed + 2, at) % 8) / 8 *
                           (1 + 1e-7 * static_cast<double>(drawn(seed + 3, at) % 3)));
    }
  }
  return d;
}

struct Limited {
  HostTensor kept, lost;
  friend bool operator==(const Limited&, const Limited&) = default;
};

Limited limit(const Case& c, const Drawn& d) {
  OpExec ex;
  Limited out{HostTensor({c.tokens, c.k}, DType::kI32),
              HostTensor({c.tokens / c.pool, c.experts}, DType::kF32)};
  ops::limit_choices(ex, out.kept, out.lost,
                     {d.index, c.weighed ? ConstTensorView(d.weight) : ConstTensorView{}, d.row},
                     {c.pool, c.capacity});
  finish_ops();
  return out;
}

class Capacity : public testing::TestWithParam<Case> {};

// In words of the contract: of each pool and expert all assignments, sorted, the first `capacity` of them kept.
TEST_P(Capacity, KeepsTheFirstOnes) {
  const Case& c = GetParam();
  const Drawn d = draw(c, 1);
  const Limited out = limit(c, d);
  Values kept(static_cast<std::size_t>(c.tokens * c.k), -1), lost(out.lost.size(), 0);
  for (std::int64_t g = 0; g < c.tokens / c.pool; ++g)
    for (std::int64_t e = 0; e < c.experts; ++e) {
      std::vector<std::tuple<double, std::int64_t, std::int64_t, std::size_t>> mine;
      for (std::int64_t place = g * c.pool; place < (g + 1) * c.pool; ++place)
        for (std::int64_t j = 0; j < c.k; ++j) {
          const auto at = static_cast<std::size_t>(d.row.get(static_cast<std::size_t>(place))) *
                              static_cast<std::size_t>(c.k) +
                          static_cast<std::size_t>(j);
          if (d.index.get(at) == static_cast<double>(e))
            mine.emplace_back(c.weighed ? -test::compared(d.weight.get(at)) : 0, j, place, at);
        }
      std::sort(mine.begin(), mine.end());
      for (std::size_t i = 0; i < mine.size(); ++i)
        if (static_cast<std::int64_t>(i) < c.capacity) {
          kept[std::get<3>(mine[i])] = static_cast<double>(e);
        } else {
          lost[static_cast<std::size_t>(g * c.experts + e)] += 1;
        }
    }
  EXPECT_EQ(out.kept.values(), kept);
  EXPECT_EQ(out.lost.values(), lost);
}

// The same tokens, lying elsewhere: every token keeps the same experts.
TEST_P(Capacity, DoesNotDependOnWhereTokensLie) {
  const Case& c = GetParam();
  const Drawn here = draw(c, 1);
  Drawn there = here;
  const std::vector<std::int64_t> to = shuffled(c.tokens, 99);
  for (std::size_t t = 0; t < to.size(); ++t)
    for (std::size_t j = 0; j < static_cast<std::size_t>(c.k); ++j) {
      const auto k = static_cast<std::size_t>(c.k), at = static_cast<std::size_t>(to[t]) * k + j;
      there.index.set(at, here.index.get(t * k + j));
      there.weight.set(at, here.weight.get(t * k + j));
    }
  for (std::size_t p = 0; p < to.size(); ++p)
    there.row.set(p, static_cast<double>(to[static_cast<std::size_t>(here.row.get(p))]));
  const Limited one = limit(c, here), other = limit(c, there);
  for (std::size_t t = 0; t < to.size(); ++t)
    for (std::size_t j = 0; j < static_cast<std::size_t>(c.k); ++j)
      EXPECT_EQ(one.kept.get(t * static_cast<std::size_t>(c.k) + j),
                other.kept.get(static_cast<std::size_t>(to[t]) * static_cast<std::size_t>(c.k) + j));
  EXPECT_EQ(one.lost.values(), other.lost.values());
}

// What every limit keeps to: nobody more than the capacity, nothing that was not chosen, and nothing lost but what an
// expert that is full did not take.
TEST_P(Capacity, LosesNoMoreThanItMust) {
  const Case& c = GetParam();
  const Drawn d = draw(c, 5);
  const Limited out = limit(c, d);
  std::vector<std::int64_t> pool_of(static_cast<std::size_t>(c.tokens));
  for (std::int64_t p = 0; p < c.tokens; ++p)
    pool_of[static_cast<std::size_t>(d.row.get(static_cast<std::size_t>(p)))] = p / c.pool;
  Values taken(out.lost.size(), 0), wanted(out.lost.size(), 0);
  for (std::size_t at = 0; at < out.kept.size(); ++at) {
    const double chosen = d.index.get(at), kept = out.kept.get(at);
    EXPECT_TRUE(kept == chosen || kept == -1) << at;
    if (chosen < 0) continue;
    const auto slot = static_cast<std::size_t>(pool_of[at / static_cast<std::size_t>(c.k)] * c.experts) +
                      static_cast<std::size_t>(chosen);
    wanted[slot] += 1;
    taken[slot] += kept >= 0;
  }
  for (std::size_t s = 0; s < taken.size(); ++s) {
    EXPECT_EQ(taken[s], std::min(wanted[s], static_cast<double>(c.capacity)));
    EXPECT_EQ(out.lost.get(s), wanted[s] - taken[s]);
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, Capacity,
                         testing::Values(Case{1, 1, 1, 1, 1, false}, Case{96, 6, 1, 24, 5, false},
                                         Case{96, 6, 2, 96, 20, false}, Case{96, 6, 2, 24, 5, true},
                                         Case{300, 60, 4, 300, 9, true}, Case{700, 7, 3, 350, 40, true},
                                         Case{700, 7, 3, 350, 40, false}, Case{64, 16, 8, 8, 1, true},
                                         Case{64, 16, 8, 8, 99, true}, Case{0, 4, 2, 8, 3, true}),
                         [](const auto& i) {
                           return fmt::format("{}x{}_top{}_pool{}_at_most{}{}", i.param.tokens,
                                              i.param.experts, i.param.k, i.param.pool, i.param.capacity,
                                              i.param.weighed ? "_weighed" : "");
                         });

TEST(LimitChoices, SameBitsForAnyThreadsAndBooks) {
  const Case c{1024, 16, 2, 64, 6, true};
  const Drawn d = draw(c, 3);
  expect_same_for_any_threads([&] { return limit(c, d); });
  OpExec ex;
  Limited out = limit(c, d);
  ops::limit_choices(ex, out.kept, out.lost, {d.index, d.weight, d.row}, {c.pool, c.capacity});
  expect_booked(ex.ledger(), "limit_choices", 0, 4.0 * (2 * 2048 + 1024), 4.0 * (2048 + 16 * 16));
}

// Neighbours in the last bit that is compared are no ties, wherever the limit falls among them. Four tokens have each
// weight: where only one had it, the next lower weight would serve as threshold as well.
TEST(LimitChoices, TheLastComparedBitDecides) {
  const std::int64_t tokens = 64;
  std::vector<std::int64_t> level = shuffled(tokens, 4);
  HostTensor index = filled({tokens, 1}, DType::kI32, 0), weight({tokens, 1}, DType::kF32),
             row({tokens}, DType::kI32);
  for (std::size_t t = 0; t < level.size(); ++t) {
    level[t] /= 4;
    weight.set(t, 0.5 + std::ldexp(static_cast<double>(level[t]), -13));
    row.set(t, static_cast<double>(t));
  }
  for (const std::int64_t capacity : {1, 3, 4, 6, 7, 62}) {
    OpExec ex;
    HostTensor kept({tokens, 1}, DType::kI32), lost({1, 1}, DType::kF32);
    ops::limit_choices(ex, kept, lost, {index, weight, row}, {tokens, capacity});
    finish_ops();
    for (std::size_t t = 0; t < level.size(); ++t) {
      std::int64_t before = 0;
      for (std::size_t other = 0; other < level.size(); ++other)
        before += level[other] > level[t] || (level[other] == level[t] && other < t);
      EXPECT_EQ(kept.get(t), before < capacity ? 0 : -1) << capacity << " of them, token " << t;
    }
  }
}

// As of a micro-batch of more short sequences than a grid of a GPU has rows. Rows lie backwards, so that a pool that is
// taken for another one shows.
TEST(LimitChoices, MorePoolsThanAGridHasRows) {
  const std::int64_t pools = 65537, tokens = 2 * pools;
  const HostTensor index = filled({tokens, 1}, DType::kI32, 0);
  HostTensor row({tokens}, DType::kI32), kept({tokens, 1}, DType::kI32), lost({pools, 1}, DType::kF32);
  for (std::int64_t place = 0; place < tokens; ++place)
    row.set(static_cast<std::size_t>(place), static_cast<double>(tokens - 1 - place));
  OpExec ex;
  ops::limit_choices(ex, kept, lost, {index, {}, row}, {2, 1});
  finish_ops();
  Values first(static_cast<std::size_t>(tokens));
  for (std::size_t t = 0; t < first.size(); ++t) first[t] = t % 2 == 1 ? 0 : -1;
  EXPECT_TRUE(kept.values() == first);
  EXPECT_TRUE(lost.values() == Values(static_cast<std::size_t>(pools), 1));
}

TEST(LimitChoices, RefusesPoolsThatDoNotFit) {
  const Case c{12, 4, 2, 4, 3, false};
  const Drawn d = draw(c, 3);
  OpExec ex;
  HostTensor kept({12, 2}, DType::kI32), lost({3, 4}, DType::kF32);
  for (const CapacityRule& rule :
       {CapacityRule{5, 3}, CapacityRule{0, 3}, CapacityRule{4, 0}, CapacityRule{6, 3}})
    EXPECT_THROW(ops::limit_choices(ex, kept, lost, {d.index, {}, d.row}, rule), Error) << rule.pool;
}

}  // namespace
}  // namespace upmoe::test
