// Routers that look at the tokens of a group, against the formulas of the contract in double.

#include "kernels/ops/token_groups.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "tests/support/compared_weight.h"
#include "tests/support/drawn.h"
#include "tests/support/op_exec.h"
#include "tests/support/random_tensor.h"
#include "tests/support/reference_model.h"
#include "tests/support/tolerance.h"

namespace upmoe::test {
namespace {

struct Case {
  std::int64_t positions, same, size, experts;
  std::int64_t full, last;  // tokens that an expert takes
  std::int64_t tokens() const { return positions * same; }
  std::size_t of_position() const { return static_cast<std::size_t>((same + size - 1) / size); }
};

std::size_t index_of(std::int64_t i) {
  return static_cast<std::size_t>(i);
}

HostTensor shuffled_rows(std::int64_t n) {
  const std::vector<std::int64_t> order = shuffled(n, 3);
  HostTensor rows({n}, DType::kI32);
  for (std::size_t i = 0; i < order.size(); ++i) rows.set(i, static_cast<double>(order[i]));
  return rows;
}

// Few different values where `ties`, but for rounding.
HostTensor values(Shape shape, DType dtype, std::uint64_t seed, bool ties = false) {
  HostTensor x(shape, dtype);
  for (std::size_t i = 0; i < x.size(); ++i)
    x.set(i, ties ? static_cast<double>(drawn(seed, i) % 5) / 8 *
                        (1 + 1e-7 * static_cast<double>(drawn(seed + 1, i) % 3))
                  : static_cast<double>(drawn(seed, i) % 4001) / 1000 - 2);
  return x;
}

TokenGroups groups_of(const Case& c, const HostTensor& rows) {
  return {rows, c.same, c.size};
}

// The rows of each group, as the contract says.
std::vector<std::vector<std::size_t>> members(const Case& c, const HostTensor& rows) {
  std::vector<std::vector<std::size_t>> all;
  for (std::int64_t p = 0; p < c.positions; ++p)
    for (std::int64_t begin = 0; begin < c.same; begin += c.size) {
      all.emplace_back();
      for (std::int64_t i = begin; i < std::min(c.same, begin + c.size); ++i)
        all.back().push_back(static_cast<std::size_t>(rows.get(index_of(p * c.same + i))));
    }
  return all;
}

class Groups : public testing::TestWithParam<Case> {};

TEST_P(Groups, EveryExpertTakesItsBestTokens) {
  const Case& c = GetParam();
  const HostTensor rows = shuffled_rows(c.tokens()),
                   probs = values({c.tokens(), c.experts}, DType::kF32, 1, true);
  HostTensor index({c.tokens(), c.experts}, DType::kI32);
  OpExec ex;
  ops::choose_tokens(ex, index, probs, groups_of(c, rows), {c.full, c.last});
  finish_ops();
  Values expected(index.size(), -1);
  const auto all = members(c, rows);
  const std::size_t E = index_of(c.experts);
  for (std::size_t g = 0; g < all.size(); ++g)
    for (std::size_t e = 0; e < E; ++e) {
      std::vector<std::size_t> best = all[g];
      std::stable_sort(best.begin(), best.end(), [&](std::size_t a, std::size_t b) {
        return test::compared(probs.get(a * E + e)) > test::compared(probs.get(b * E + e));
      });
      const bool last = (g + 1) % c.of_position() == 0;
      std::int64_t taken = 0;
      for (std::size_t i = 0; i < best.size(); ++i) {
        taken += index.get(best[i] * E + e) == static_cast<double>(e);
        if (static_cast<std::int64_t>(i) < (last ? c.last : c.full))
          expected[best[i] * E + e] = static_cast<double>(e);
      }
      EXPECT_EQ(taken, last ? c.last : c.full) << "exactly so many, group " << g << ", expert " << e;
    }
  EXPECT_EQ(index.values(), expected);
}

// A group's choices are its own: another group's probabilities do not change them.
TEST_P(Groups, OtherGroupsDoNotMatter) {
  const Case& c = GetParam();
  const HostTensor rows = shuffled_rows(c.tokens());
  HostTensor probs = values({c.tokens(), c.experts}, DType::kF32, 1);
  const auto all = members(c, rows);
  if (all.size() < 2) return;
  const std::size_t E = index_of(c.experts);
  OpExec ex;
  HostTensor before(Shape{c.tokens(), c.experts}, DType::kI32),
      after = before, part(Shape{c.tokens(), c.experts}, DType::kF32), other_part = part;
  ops::choose_tokens(ex, before, probs, groups_of(c, rows), {c.full, c.last});
  ops::mixture_parts(ex, part, probs, groups_of(c, rows), 0.5f);
  finish_ops();
  for (const std::size_t row : all.back())
    for (std::size_t e = 0; e < E; ++e) probs.set(row * E + e, -probs.get(row * E + e));
  ops::choose_tokens(ex, after, probs, groups_of(c, rows), {c.full, c.last});
  ops::mixture_parts(ex, other_part, probs, groups_of(c, rows), 0.5f);
  finish_ops();
  for (std::size_t g = 0; g + 1 < all.size(); ++g)
    for (const std::size_t row : all[g])
      for (std::size_t e = 0; e < E; ++e) {
        EXPECT_EQ(before.get(row * E + e), after.get(row * E + e));
        EXPECT_EQ(part.get(row * E + e), other_part.get(row * E + e));
      }
}

// u is fp32's unit of rounding. An exponential errs by a share of d = 2 u a + 4 u: a is its argument, of which a
// difference and a quotient were rounded, and exp is right to two units in the last place. Of p = exp / sum that is
// 2 p (1 - p) d at most, as what all terms of the sum share falls out; n terms are added and one quotient taken, which
// is (n + 1) u p more. In the backward each part has that error, the sum of n products (n + 1) u of their sizes, and
// the difference, the product and the quotient u each.
TEST_P(Groups, PartsAreASoftmaxOverTheGroup) {
  const Case& c = GetParam();
  const HostTensor rows = shuffled_rows(c.tokens()), logits = values({c.tokens(), c.experts}, DType::kF32, 1),
                   dpart = values({c.tokens(), c.experts}, DType::kF32, 2);
  const auto temperature = static_cast<double>(0.7f);
  HostTensor part({c.tokens(), c.experts}, DType::kF32), dlogits = part;
  OpExec ex;
  ops::mixture_parts(ex, part, logits, groups_of(c, rows), static_cast<float>(temperature));
  ops::mixture_parts_backward(ex, dlogits, dpart, part, groups_of(c, rows), static_cast<float>(temperature));
  finish_ops();
  const std::size_t E = index_of(c.experts);
  for (const auto& group : members(c, rows))
    for (std::size_t e = 0; e < E; ++e) {
      const double n = static_cast<double>(group.size());
      double largest = -INFINITY, least = INFINITY, sum = 0, dot = 0, of_dot = 0;
      for (const std::size_t row : group) {
        largest = std::max(largest, logits.get(row * E + e));
        least = std::min(least, logits.get(row * E + e));
        sum += std::exp(logits.get(row * E + e) / temperature);
      }
      const double of_exp = kUnit * (2 * (largest - least) / temperature + 4);
      const auto of_part = [&](double p) { return 2 * p * (1 - p) * of_exp + (n + 1) * kUnit * p; };
      for (const std::size_t row : group) {
        const double p = std::exp(logits.get(row * E + e) / temperature) / sum, dp = dpart.get(row * E + e);
        dot += p * dp;
        of_dot += (of_part(p) + (n + 1) * kUnit * p) * std::abs(dp);
      }
      for (const std::size_t row : group) {
        const double p = std::exp(logits.get(row * E + e) / temperature) / sum,
                     difference = dpart.get(row * E + e) - dot, dh = p * difference / temperature;
        const double of_dh =
            (of_part(p) * std::abs(difference) + p * of_dot) / temperature + 3 * kUnit * std::abs(dh);
        EXPECT_NEAR(part.get(row * E + e), p, of_part(p) + 1e-12);
        EXPECT_NEAR(dlogits.get(row * E + e), dh, of_dh + 1e-12);
      }
    }
}

// Half of the last place of x in fp32, or of what rounding made of it.
double half_a_place(double x) {
  return x == 0 ? 0.0 : std::ldexp(kUnit, std::ilogb(std::abs(x) * 1.0001));
}

// How far a sum of products in fp32 may be from the true one, with one rounding to the dtype at its end, which for bf16
// is 2^-8 of what it rounds. In any order n products take n roundings each: n u of each to the first order, and u more
// than covers the others. In the order of add() each step rounds a product, and then what the sum is by then.
struct Summed {
  std::int64_t n = 0;
  double sum = 0, size = 0, steps = 0;
  void add(double term) {
    ++n;
    sum += term;
    size += std::abs(term);
    steps += half_a_place(term) + half_a_place(sum);
  }
  double in_any_order(DType dtype) const { return rounded(static_cast<double>(n + 1) * kUnit * size, dtype); }
  double in_order(DType dtype) const { return rounded(1.01 * steps, dtype); }
  double rounded(double of_sum, DType dtype) const {
    return of_sum + (dtype == DType::kBF16 ? (std::abs(sum) + of_sum) / 256 : 0.0);
  }
};

constexpr std::int64_t kWidth = 37;

// Of the tokens from `first` on, each result with its bounds.
struct Mixed {
  HostTensor mix, y, dpart;
  Values of_mix;
};
Mixed mixed(const Case& c, std::int64_t first, std::int64_t tokens, DType dtype, const HostTensor& rows) {
  const std::int64_t M = static_cast<std::int64_t>(members(c, rows).size()) * c.experts;
  const auto rows_of = [&](const HostTensor& all, std::int64_t width) {
    HostTensor part({tokens, width}, all.on_host().dtype);
    for (std::size_t i = 0; i < part.size(); ++i) part.set(i, all.get(index_of(first * width) + i));
    return part;
  };
  const HostTensor x = rows_of(values({c.tokens(), kWidth}, dtype, 5), kWidth),
                   part = rows_of(values({c.tokens(), c.experts}, DType::kF32, 6), c.experts),
                   outputs = values({M + 3, kWidth}, dtype, 7),
                   y = rows_of(values({c.tokens(), kWidth}, dtype, 8), kWidth),
                   dpart = rows_of(values({c.tokens(), c.experts}, DType::kF32, 9), c.experts);
  Mixed out{HostTensor({M + 3, kWidth}, dtype), y, dpart, {}};
  OpExec ex;
  const GroupsHere here{groups_of(c, rows), first};
  ops::mix_tokens(ex, out.mix, x, part, here);
  ops::share_mixtures(ex, out.y, outputs, part, here);
  ops::mixture_part_gradient(ex, out.dpart, x, outputs, here, Accumulate::kAdd);
  finish_ops();

  const std::size_t E = index_of(c.experts), D = kWidth;
  std::vector<Summed> mix(out.mix.size());
  const auto all = members(c, rows);
  for (std::size_t g = 0; g < all.size(); ++g)
    for (const std::size_t row : all[g]) {
      if (row < index_of(first) || row >= index_of(first + tokens)) continue;
      const std::size_t t = row - index_of(first);
      for (std::size_t d = 0; d < D; ++d) {
        Summed sum;
        for (std::size_t e = 0; e < E; ++e) {
          mix[(g * E + e) * D + d].add(part.get(t * E + e) * x.get(t * D + d));
          sum.add(part.get(t * E + e) * outputs.get((g * E + e) * D + d));
        }
        sum.add(y.get(t * D + d));
        EXPECT_NEAR(out.y.get(t * D + d), sum.sum, sum.in_order(dtype));
      }
      for (std::size_t e = 0; e < E; ++e) {
        Summed sum;
        sum.add(dpart.get(t * E + e));
        for (std::size_t d = 0; d < D; ++d) sum.add(x.get(t * D + d) * outputs.get((g * E + e) * D + d));
        EXPECT_NEAR(out.dpart.get(t * E + e), sum.sum, sum.in_any_order(DType::kF32));
      }
    }
  for (std::size_t i = 0; i < mix.size(); ++i) {
    out.of_mix.push_back(mix[i].in_order(dtype));
    EXPECT_NEAR(out.mix.get(i), mix[i].sum, out.of_mix.back());
  }
  return out;
}

// Two calls, each with a part of the tokens: their mixtures add up to those of one with all, each within its own bound
// of the true ones. What a token gets does not depend on who else is there, to the bit.
TEST_P(Groups, MixturesAreSumsThatTokensShare) {
  const Case& c = GetParam();
  const HostTensor rows = shuffled_rows(c.tokens());
  const std::int64_t cut = c.tokens() / 3;
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    const Mixed whole = mixed(c, 0, c.tokens(), dtype, rows), front = mixed(c, 0, cut, dtype, rows),
                back = mixed(c, cut, c.tokens() - cut, dtype, rows);
    for (std::size_t i = 0; i < whole.mix.size(); ++i)
      EXPECT_NEAR(front.mix.get(i) + back.mix.get(i), whole.mix.get(i),
                  front.of_mix[i] + back.of_mix[i] + whole.of_mix[i]);
    const auto together = [](const HostTensor& a, const HostTensor& b) {
      Values both = a.values();
      const Values behind = b.values();
      both.insert(both.end(), behind.begin(), behind.end());
      return both;
    };
    EXPECT_EQ(together(front.y, back.y), whole.y.values());
    EXPECT_EQ(together(front.dpart, back.dpart), whole.dpart.values());
    mixed(c, cut, c.tokens() / 2, dtype, rows);
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, Groups,
                         testing::Values(Case{1, 1, 1, 1, 1, 1}, Case{8, 4, 4, 6, 2, 2},
                                         Case{16, 8, 4, 64, 1, 1}, Case{5, 7, 3, 5, 2, 1},
                                         Case{3, 2, 4, 9, 0, 1}, Case{40, 32, 32, 12, 8, 8},
                                         Case{0, 4, 2, 3, 1, 1}),
                         [](const auto& i) {
                           return fmt::format("{}positions_{}same_{}size_{}experts", i.param.positions,
                                              i.param.same, i.param.size, i.param.experts);
                         });

TEST(TokenGroups, SameBitsForAnyThreadsAndBooks) {
  const Case c{64, 8, 4, 16, 2, 2};
  const HostTensor rows = shuffled_rows(512), probs = values({512, 16}, DType::kF32, 1),
                   x = values({512, 40}, DType::kF32, 2);
  const auto all = [&] {
    OpExec ex;
    HostTensor part({512, 16}, DType::kF32), mix({128 * 16, 40}, DType::kF32), index({512, 16}, DType::kI32);
    ops::choose_tokens(ex, index, probs, groups_of(c, rows), {2, 2});
    ops::mixture_parts(ex, part, probs, groups_of(c, rows), 1.0f);
    ops::mix_tokens(ex, mix, x, part, {groups_of(c, rows), 0});
    finish_ops();
    expect_booked(ex.ledger(), "choose_tokens", 0, 4.0 * (512 * 16 + 512), 4.0 * 512 * 16);
    expect_booked(ex.ledger(), "mix_tokens", 2.0 * 512 * 16 * 40, 4.0 * (512 * 40 + 512 * 16 + 512),
                  4.0 * 128 * 16 * 40);
    EXPECT_EQ(ex.ledger().total().model_flops, 2.0 * 512 * 16 * 40);
    return std::tuple(part.values(), mix.values(), index.values());
  };
  expect_same_for_any_threads(all);
}

TEST(TokenGroups, RefusesWhatDoesNotFit) {
  const HostTensor rows = shuffled_rows(12), probs = values({12, 4}, DType::kF32, 1);
  HostTensor index({12, 4}, DType::kI32), x({6, 8}, DType::kF32), part({6, 4}, DType::kF32),
      mix({11, 8}, DType::kF32);
  OpExec ex;
  EXPECT_THROW(ops::choose_tokens(ex, index, probs, {rows, 5, 2}, {1, 1}), Error) << "12 are not fives";
  EXPECT_THROW(ops::choose_tokens(ex, index, probs, {rows, 4, 0}, {1, 1}), Error);
  EXPECT_THROW(ops::choose_tokens(ex, index, probs, {rows, 4, 2}, {3, 2}), Error) << "3 of 2";
  EXPECT_THROW(ops::choose_tokens(ex, index, probs, {rows, 4, 3}, {3, 2}), Error) << "2 of the last one";
  EXPECT_THROW(ops::mix_tokens(ex, mix, x, part, {{rows, 4, 4}, 0}), Error) << "3 groups of 4 experts";
  HostTensor large({12, 8}, DType::kF32);
  EXPECT_THROW(ops::mix_tokens(ex, large, x, part, {{rows, 4, 4}, 7}), Error) << "rows 7 to 13 of 12";
  EXPECT_NO_THROW(ops::mix_tokens(ex, large, x, part, {{rows, 4, 4}, 6}));
  finish_ops();
}

TEST(TokenGroups, ALogitThatIsNotFiniteIsTold) {
  const HostTensor rows = shuffled_rows(12);
  HostTensor logits = values({12, 4}, DType::kF32, 1), part({12, 4}, DType::kF32);
  logits.set(17, std::nan(""));
  OpExec ex;
  try {
    ops::mixture_parts(ex, part, logits, {rows, 4, 2}, 1.0f);
    finish_ops();
    ADD_FAILURE() << "taken";
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ExitCode::kNumeric);
    EXPECT_NE(std::string(e.what()).find("token row 4 and expert 1"), std::string::npos) << e.what();
  }
}

}  // namespace
}  // namespace upmoe::test
