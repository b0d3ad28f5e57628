#include "kernels/ops/routing.h"

#include <gtest/gtest.h>

#include <limits>
#include <numeric>

#include "kernels/core/exchange_nodes.h"
#include "tests/support/op_exec.h"
#include "tests/support/random_tensor.h"
#include "tests/support/reference_model.h"
#include "tests/support/tolerance.h"

namespace upmoe::test {
namespace {

struct Case {
  std::int64_t tokens, experts, k;
  bool renormalize;
};

// The forward's outputs, as every other op takes them.
struct Routes {
  HostTensor probs, index, weight, lse;
  Routes(std::int64_t tokens, std::int64_t experts, std::int64_t k)
      : probs({tokens, experts}, DType::kF32),
        index({tokens, k}, DType::kI32),
        weight({tokens, k}, DType::kF32),
        lse({tokens}, DType::kF32) {}
  friend bool operator==(const Routes&, const Routes&) = default;
};

Routes route(const HostTensor& logits, std::int64_t tokens, std::int64_t experts, std::int64_t k,
             bool renormalize) {
  OpExec ex;
  Routes r(tokens, experts, k);
  ops::route_tokens(ex, r.probs, r.index, r.weight, r.lse, logits, renormalize);
  finish_ops();
  return r;
}

class Route : public testing::TestWithParam<Case> {
 protected:
  const std::int64_t T = GetParam().tokens, E = GetParam().experts, K = GetParam().k;
  const bool renormalize = GetParam().renormalize;
  HostTensor logits{random_tensor({T, E}, DType::kF32, 1, 2.0)};
  OpExec ex;
};

TEST_P(Route, Forward) {
  const Routes r = route(logits, T, E, K, renormalize);
  const auto width = static_cast<std::size_t>(E), k = static_cast<std::size_t>(K);
  const Values expected = reference_softmax(logits.values(), width), x = logits.values();
  expect_close(r.probs.values(), expected, {2e-6, 1e-9}, "probs");
  for (std::size_t t = 0; t < static_cast<std::size_t>(T); ++t) {
    EXPECT_NEAR(r.lse.get(t), reference_lse(x.data() + t * width, width), 2e-6);
    const auto top = reference_top_k(expected.data() + t * width, width, k);
    double selected = 0;
    for (std::size_t j = 0; j < k; ++j) selected += expected[t * width + static_cast<std::size_t>(top[j])];
    for (std::size_t j = 0; j < k; ++j) {
      EXPECT_EQ(r.index.get(t * k + j), top[j]) << t << ", " << j;
      const double weight =
          expected[t * width + static_cast<std::size_t>(top[j])] / (renormalize ? selected : 1);
      EXPECT_NEAR(r.weight.get(t * k + j), weight, 3e-6 * weight);
    }
  }
}

TEST_P(Route, BackwardIsTheDerivative) {
  const Routes r = route(logits, T, E, K, renormalize);
  const HostTensor dweight = random_tensor({T, K}, DType::kF32, 2),
                   aux = random_tensor({E}, DType::kF32, 3, 0.3);
  HostTensor dlogits({T, E}, DType::kF32);
  ops::route_tokens_backward(ex, dlogits, dweight, {aux, {}, 0.05f}, {r.probs, r.index, r.weight, r.lse},
                             renormalize);
  const auto width = static_cast<std::size_t>(E), k = static_cast<std::size_t>(K);
  // The choice of experts is frozen.
  const auto loss = [&](const Values& x) {
    const Values p = reference_softmax(x, width);
    double sum = 0;
    for (std::size_t t = 0; t < static_cast<std::size_t>(T); ++t) {
      double selected = 0, weighted = 0;
      for (std::size_t j = 0; j < k; ++j) {
        const double p_j = p[t * width + static_cast<std::size_t>(r.index.get(t * k + j))];
        selected += p_j;
        weighted += dweight.get(t * k + j) * p_j;
      }
      const double lse = reference_lse(x.data() + t * width, width);
      sum += (renormalize ? weighted / selected : weighted) + 0.05 * lse * lse;
      for (std::size_t e = 0; e < width; ++e) sum += aux.get(e) * p[t * width + e];
    }
    return sum;
  };
  expect_close(dlogits.values(), numeric_gradient(loss, logits.values()), {1e-5, 2e-6}, "dlogits");
}

INSTANTIATE_TEST_SUITE_P(Shapes, Route,
                         testing::Values(Case{1, 1, 1, false}, Case{7, 13, 1, false}, Case{7, 13, 13, true},
                                         Case{33, 60, 4, false}, Case{33, 60, 4, true}, Case{20, 16, 2, true},
                                         Case{5, 100, 8, false}, Case{0, 8, 2, true}),
                         [](const auto& i) {
                           return fmt::format("{}x{}_top{}{}", i.param.tokens, i.param.experts, i.param.k,
                                              i.param.renormalize ? "_renormalized" : "");
                         });

TEST(RouteTies, LowestIndexFirst) {
  const Routes equal = route(filled({3, 60}, DType::kF32, 0.0), 3, 60, 4, false);
  for (std::size_t i = 0; i < 12; ++i) EXPECT_EQ(equal.index.get(i), static_cast<double>(i % 4));
  EXPECT_NEAR(equal.weight.get(5), 1.0 / 60, 1e-8);
  const Routes some = route(tensor_of({1, 6}, DType::kF32, {1, 2, 0, 2, 1, 2}), 1, 6, 5, true);
  EXPECT_EQ(some.index.values(), (Values{1, 3, 5, 0, 4}));
}

TEST(RouteExtremes, LargeLogits) {
  const Routes r =
      route(tensor_of({2, 4}, DType::kF32, {1e4, -1e4, 1e4, 0, -1e4, -1e4, -1e4, -9999}), 2, 4, 2, true);
  EXPECT_EQ(r.index.values(), (Values{0, 2, 3, 0}));
  expect_close(r.weight.values(), {0.5, 0.5, 1 / (1 + std::exp(-1.0)), std::exp(-1.0) / (1 + std::exp(-1.0))},
               {1e-6, 0}, "weight");
  EXPECT_NEAR(r.lse.get(0), 1e4 + std::log(2.0), 1e-3);
}

TEST(RouteChecks, NonFiniteLogitNamesItsPlace) {
  for (double bad : {static_cast<double>(INFINITY), -static_cast<double>(INFINITY),
                     std::numeric_limits<double>::quiet_NaN()}) {
    HostTensor logits = random_tensor({700, 60}, DType::kF32, 1);
    logits.set(500 * 60 + 17, bad);
    logits.set(600 * 60 + 3, bad);
    try {
      route(logits, 700, 60, 4, false);
      ADD_FAILURE() << bad << " was accepted";
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ExitCode::kNumeric);
      EXPECT_NE(std::string(e.what()).find("token row 500 and expert 17"), std::string::npos) << e.what();
    }
  }
}

TEST(Balance, SumsAndCounts) {
  OpExec ex;
  const HostTensor logits = random_tensor({600, 13}, DType::kF32, 1, 1.5);
  const Routes r = route(logits, 600, 13, 3, false);
  HostTensor stats = filled({3, 13}, DType::kF64, 99), z = filled({1}, DType::kF64, 99);
  ops::balance_stats(ex, stats, z, r.probs, r.index, r.lse);
  Values expected(39);
  double lse_squares = 0;
  for (std::size_t t = 0; t < 600; ++t) {
    for (std::size_t j = 0; j < 3; ++j) expected[static_cast<std::size_t>(r.index.get(t * 3 + j))] += 1;
    expected[13 + static_cast<std::size_t>(r.index.get(t * 3))] += 1;
    for (std::size_t e = 0; e < 13; ++e) expected[26 + e] += r.probs.get(t * 13 + e);
    lse_squares += r.lse.get(t) * r.lse.get(t);
  }
  expect_close(stats.values(), expected, {1e-13, 0}, "stats");
  EXPECT_NEAR(z.get(0), lse_squares, 1e-10 * lse_squares);
}

TEST(ExpandChoices, EveryChoiceBecomesItsPieces) {
  OpExec ex;
  const std::int64_t T = 50, K = 3, E = 7, P = 4;
  HostTensor index({T, K}, DType::kI32), pieces({E, P}, DType::kI32), out({T, K * P}, DType::kI32);
  for (std::size_t i = 0; i < index.size(); ++i) index.set(i, static_cast<double>(i * 5 % 7));
  for (std::size_t i = 0; i < pieces.size(); ++i) pieces.set(i, static_cast<double>(27 - i));
  ops::expand_choices(ex, out, index, pieces);
  for (std::size_t i = 0; i < index.size(); ++i)
    for (std::size_t j = 0; j < 4; ++j)
      EXPECT_EQ(out.get(i * 4 + j), pieces.get(static_cast<std::size_t>(index.get(i)) * 4 + j));
  index.set(3, -1);
  ops::expand_choices(ex, out, index, pieces);
  for (std::size_t j = 0; j < 4; ++j) EXPECT_EQ(out.get(3 * 4 + j), -1);
  EXPECT_EQ(out.get(4 * 4), pieces.get(6 * 4));
  for (const double wrong : {7, -2}) {
    index.set(3, wrong);
    EXPECT_THROW((ops::expand_choices(ex, out, index, pieces), finish_ops()), Error);
  }
}

struct Sorted {
  HostTensor order, slot, counts;
};

Sorted sort(const HostTensor& index, std::int64_t tokens, std::int64_t k, std::int64_t experts) {
  OpExec ex;
  Sorted s{HostTensor({tokens * k}, DType::kI32), HostTensor({tokens, k}, DType::kI32),
           HostTensor({experts}, DType::kI32)};
  ops::sort_by_expert(ex, s.order, s.slot, s.counts, index);
  finish_ops();
  return s;
}

TEST(RegroupRuns, RunsGoWhereTheyBelong) {
  OpExec ex;
  // Two ranks send for three experts each; the fourth run is empty.
  HostTensor regroup({10}, DType::kI32), ungroup({10}, DType::kI32);
  const std::vector<std::int64_t> runs{0, 2, 3, 6, 6, 9, 10}, places{0, 9, 6, 2, 2, 5};
  ops::regroup_runs(ex, regroup, ungroup, runs, places);
  EXPECT_EQ(ungroup.values(), (Values{0, 1, 9, 6, 7, 8, 2, 3, 4, 5}));
  for (std::size_t i = 0; i < 10; ++i)
    EXPECT_EQ(regroup.get(static_cast<std::size_t>(ungroup.get(i))), static_cast<double>(i));
  EXPECT_THROW(ops::regroup_runs(ex, regroup, ungroup, runs, std::span(places).first(5)), Error);
  HostTensor none({0}, DType::kI32);
  ops::regroup_runs(ex, none, none, std::vector<std::int64_t>{0}, {});
}

TEST(Sort, StableAndInverse) {
  const std::int64_t T = 301, K = 4, E = 7;
  HostTensor index({T, K}, DType::kI32);
  // None for the last.
  for (std::size_t i = 0; i < index.size(); ++i) index.set(i, static_cast<double>(i * i % 6));
  const Sorted s = sort(index, T, K, E);
  std::vector<std::size_t> expected(index.size());
  std::iota(expected.begin(), expected.end(), 0);
  std::stable_sort(expected.begin(), expected.end(),
                   [&](std::size_t a, std::size_t b) { return index.get(a) < index.get(b); });
  Values counts(static_cast<std::size_t>(E));
  for (std::size_t i = 0; i < expected.size(); ++i) {
    ASSERT_EQ(s.order.get(i), static_cast<double>(expected[i])) << i;
    ASSERT_EQ(s.slot.get(expected[i]), static_cast<double>(i));
    counts[static_cast<std::size_t>(index.get(i))] += 1;
  }
  EXPECT_EQ(s.counts.values(), counts);
}

TEST(Sort, OneExpertTakesAllAndNoTokens) {
  const Sorted all = sort(filled({50, 1}, DType::kI32, 3), 50, 1, 5);
  EXPECT_EQ(all.counts.values(), (Values{0, 0, 0, 50, 0}));
  for (std::size_t i = 0; i < 50; ++i) EXPECT_EQ(all.order.get(i), static_cast<double>(i));
  EXPECT_EQ(sort(HostTensor({0, 4}, DType::kI32), 0, 4, 2).counts.values(), (Values{0, 0}));
}

// A node without experts is sent no rows, and none has a place there.
TEST(Sort, OfNoExperts) {
  for (const std::int64_t tokens : {0, 5}) {
    const Sorted none = sort(filled({tokens, 2}, DType::kI32, -1), tokens, 2, 0);
    EXPECT_EQ(none.counts.size(), 0u);
    EXPECT_EQ(none.slot.values(), Values(static_cast<std::size_t>(2 * tokens), -1));
  }
}

TEST(Sort, OffsetsAreTheSumsOfTheCounts) {
  OpExec ex;
  for (const std::int64_t experts : {std::int64_t{1}, std::int64_t{60}, std::int64_t{700}}) {
    HostTensor counts({experts}, DType::kI32), offsets({experts + 1}, DType::kI32);
    for (std::size_t e = 0; e < counts.size(); ++e) counts.set(e, static_cast<double>(e * e % 5));
    ops::row_offsets(ex, offsets, counts);
    finish_ops();
    double sum = 0;
    for (std::size_t e = 0; e < counts.size(); sum += counts.get(e++)) ASSERT_EQ(offsets.get(e), sum) << e;
    EXPECT_EQ(offsets.get(counts.size()), sum);
  }
  EXPECT_THROW(ops::row_offsets(ex, HostTensor({3}, DType::kI32).view(), HostTensor({3}, DType::kI32)),
               Error);
}

TEST(Sort, RefusesAnIndexOutOfRange) {
  EXPECT_THROW(sort(filled({3, 1}, DType::kI32, 5), 3, 1, 5), Error);
  EXPECT_THROW(sort(filled({3, 1}, DType::kI32, -2), 3, 1, 5), Error);
}

TEST(Sort, ChoicesThatAreNoneTakeNoPlace) {
  const HostTensor index = tensor_of({3, 2}, DType::kI32, {4, -1, -1, 0, 4, 2});
  const Sorted s = sort(index, 3, 2, 5);
  EXPECT_EQ(s.counts.values(), (Values{1, 0, 1, 0, 2}));
  EXPECT_EQ(s.slot.values(), (Values{2, -1, -1, 0, 3, 1}));
  for (std::size_t i = 0; i < 4; ++i)
    EXPECT_EQ(s.slot.get(static_cast<std::size_t>(s.order.get(i))), static_cast<double>(i));
  OpExec ex;
  const HostTensor rows = tensor_of({4, 1}, DType::kF32, {1, 10, 100, 1000});
  HostTensor sum = filled({3, 1}, DType::kF32, 5);
  ops::gather_sum_rows(ex, sum, rows, s.slot);
  EXPECT_EQ(sum.values(), (Values{100, 1, 1010}));
}

// Experts 0 to 2 on node 0, 3 and 4 on node 1.
TEST(Nodes, OneRowForEachTokenAndNode) {
  OpExec ex;
  const HostTensor index = tensor_of({4, 2}, DType::kI32, {0, 2, 4, 1, 3, 4, 2, 3}),
                   weight = tensor_of({4, 2}, DType::kF32, {1, 2, 3, 4, 5, 6, 7, 8});
  HostTensor order({8}, DType::kI32), slot({4, 2}, DType::kI32), counts({2}, DType::kI32);
  const std::vector<std::int64_t> begin{0, 3, 5}, rows{3, 3};
  ops::group_by_node(ex, order, slot, counts, index, begin);
  EXPECT_EQ(counts.values(), (Values{3, 3}));
  EXPECT_EQ(slot.values(), (Values{0, -1, 1, 3, -1, 4, 2, 5}));
  HostTensor chosen({6, 2}, DType::kI32), weights({6, 2}, DType::kF32);
  const ConstTensorView order_X = order;
  ops::node_choices(ex, chosen, weights, {order_X.rows(0, 6), rows, begin}, index, weight);
  EXPECT_EQ(chosen.values(), (Values{0, 2, -1, 1, 2, -1, 1, -1, 0, 1, -1, 0}));
  EXPECT_EQ(weights.values(), (Values{1, 2, 0, 4, 7, 0, 3, 0, 5, 6, 0, 8}));
}

// An expert on each of them: a configuration asks for no more nodes of GPUs.
TEST(Nodes, AsManyAsAGpuTakes) {
  for (const std::int64_t nodes : {kMostNodesOfAGpu, kMostNodesOfAGpu + 1}) {
    OpExec ex;
    const double last = static_cast<double>(nodes) - 1;
    const HostTensor index = tensor_of({2, 2}, DType::kI32, {0, last, last - 1, last}),
                     weight = tensor_of({2, 2}, DType::kF32, {1, 2, 3, 4});
    HostTensor order({2 * nodes}, DType::kI32), slot({2, nodes}, DType::kI32), counts({nodes}, DType::kI32);
    std::vector<std::int64_t> begin(static_cast<std::size_t>(nodes) + 1), rows;
    std::iota(begin.begin(), begin.end(), 0);
    if (on_gpu() && nodes > kMostNodesOfAGpu) {
      EXPECT_THROW(ops::group_by_node(ex, order, slot, counts, index, begin), Error);
      continue;
    }
    ops::group_by_node(ex, order, slot, counts, index, begin);
    for (const double n : counts.values()) rows.push_back(static_cast<std::int64_t>(n));
    std::vector<std::int64_t> expected(static_cast<std::size_t>(nodes));
    expected.front() = expected[expected.size() - 2] = 1;
    expected.back() = 2;
    EXPECT_EQ(rows, expected);
    HostTensor chosen({4, 2}, DType::kI32), weights({4, 2}, DType::kF32);
    const ConstTensorView order_X = order;
    ops::node_choices(ex, chosen, weights, {order_X.rows(0, 4), rows, begin}, index, weight);
    EXPECT_EQ(chosen.values(), (Values{0, -1, 0, -1, -1, 0, -1, 0}));
    EXPECT_EQ(weights.values(), (Values{1, 0, 3, 0, 0, 2, 0, 4}));
  }
}

TEST(Gather, RowsOfAnyDTypeAndWidth) {
  OpExec ex;
  const HostTensor index = tensor_of({6}, DType::kI32, {5, 0, 11, 3, 3, 8});
  for (DType dtype : {DType::kF32, DType::kBF16, DType::kI32, DType::kI64, DType::kF64})
    for (std::int64_t width : {1, 3, 64}) {
      HostTensor in({12, width}, dtype), out({6, width}, dtype);
      for (std::size_t i = 0; i < in.size(); ++i) in.set(i, static_cast<double>(i % 200));
      for (std::int64_t divisor : {1, 4}) {
        ops::gather_rows(ex, out, in, index, divisor);
        for (std::size_t i = 0; i < out.size(); ++i) {
          const auto w = static_cast<std::size_t>(width);
          const auto row = static_cast<std::size_t>(index.get(i / w)) / static_cast<std::size_t>(divisor);
          ASSERT_EQ(out.get(i), in.get(row * w + i % w)) << name_of(dtype) << " " << width;
        }
      }
    }
  HostTensor flat = tensor_of({4}, DType::kF32, {1, 2, 3, 4}), picked({6}, DType::kF32);
  EXPECT_THROW((ops::gather_rows(ex, picked, flat, index, 1), finish_ops()), Error) << "index 5 of 4 rows";
  ops::gather_rows(ex, picked, flat, index, 3);
  EXPECT_EQ(picked.values(), (Values{2, 1, 4, 2, 2, 3}));
  HostTensor nothing({0, 3}, DType::kF32);
  ops::gather_rows(ex, nothing, HostTensor({0, 3}, DType::kF32), HostTensor({0}, DType::kI32), 4);
  HostTensor wide({6, 2}, DType::kF32);
  EXPECT_THROW((ops::gather_rows(ex, wide, flat, index, 3), finish_ops()), Error) << "rows of another width";
}

TEST(RoutingThreads, SameBits) {
  const std::int64_t T = 1000, E = 60, K = 4;
  expect_same_for_any_threads([&] {
    OpExec ex;
    const Routes r = route(random_tensor({T, E}, DType::kF32, 1), T, E, K, true);
    HostTensor stats({3, E}, DType::kF64), z({1}, DType::kF64), dlogits({T, E}, DType::kF32),
        y({T, E}, DType::kF32);
    ops::balance_stats(ex, stats, z, r.probs, r.index, r.lse);
    ops::route_tokens_backward(ex, dlogits, r.weight, {random_tensor({E}, DType::kF32, 2), {}, 0.1f},
                               {r.probs, r.index, r.weight, r.lse}, true);
    const Sorted s = sort(r.index, T, K, E);
    ops::gather_sum_rows(ex, y, random_tensor({T * K, E}, DType::kF32, 3), s.slot);
    return std::tuple(r, stats, z, dlogits, y);
  });
}

TEST(RoutingChecks, RefusesWrongTensors) {
  OpExec ex;
  Routes r(4, 8, 2);
  EXPECT_THROW(
      ops::route_tokens(ex, r.probs, r.index, r.weight, r.lse, filled({4, 8}, DType::kBF16, 0), false),
      Error);
  Routes wide(4, 2, 3);
  EXPECT_THROW(ops::route_tokens(ex, wide.probs, wide.index, wide.weight, wide.lse,
                                 filled({4, 2}, DType::kF32, 0), false),
               Error)
      << "K > E";
  HostTensor stats({3, 8}, DType::kF32), z({1}, DType::kF64);
  EXPECT_THROW(ops::balance_stats(ex, stats, z, r.probs, r.index, r.lse), Error) << "stats are fp64";
}

TEST(RoutingDry, BooksOnly) {
  OpExec ex(DeviceType::kDry);
  const TensorView probs = dry_tensor({8, 6}, DType::kF32), index = dry_tensor({8, 2}, DType::kI32);
  const TensorView weight = dry_tensor({8, 2}, DType::kF32), lse = dry_tensor({8}, DType::kF32);
  ops::route_tokens(ex, probs, index, weight, lse, probs, true);
  ops::gather_rows(ex, dry_tensor({16, 10}, DType::kBF16), dry_tensor({8, 10}, DType::kBF16),
                   dry_tensor({16}, DType::kI32), 2);
  expect_booked(ex.ledger(), "route_tokens", 5 * 48, 192, 192 + 64 + 64 + 32);
  expect_booked(ex.ledger(), "gather_rows", 0, 320 + 64, 320);
}

}  // namespace
}  // namespace upmoe::test
