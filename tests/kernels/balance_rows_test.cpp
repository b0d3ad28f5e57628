// Balance terms by rows of tokens, such as sequences: what is counted for them, and their gradient.

#include <gtest/gtest.h>

#include "kernels/ops/routing.h"
#include "tests/support/op_exec.h"
#include "tests/support/random_tensor.h"
#include "tests/support/reference_model.h"
#include "tests/support/tolerance.h"

namespace upmoe::test {
namespace {

struct Routed {
  HostTensor probs, index, weight, lse;
};

Routed route(const HostTensor& logits, std::int64_t T, std::int64_t E, std::int64_t K, bool renormalize) {
  OpExec ex;
  Routed r{HostTensor({T, E}, DType::kF32), HostTensor({T, K}, DType::kI32), HostTensor({T, K}, DType::kF32),
           HostTensor({T}, DType::kF32)};
  ops::route_tokens(ex, r.probs, r.index, r.weight, r.lse, logits, renormalize);
  finish_ops();
  return r;
}

TEST(BalanceRows, SumsAndCounts) {
  OpExec ex;
  const std::int64_t T = 90, E = 45, K = 3, B = 4;  // one row has no token
  const Routed r = route(random_tensor({T, E}, DType::kF32, 1, 1.5), T, E, K, false);
  HostTensor row({T}, DType::kI32), stats = filled({2, B, E}, DType::kF64, 99);
  for (std::size_t t = 0; t < row.size(); ++t) row.set(t, static_cast<double>(t * 7 % 5 % 3));
  ops::row_balance_stats(ex, stats, r.probs, r.index, row);
  Values expected(stats.size());
  const auto width = static_cast<std::size_t>(E), half = static_cast<std::size_t>(B) * width;
  for (std::size_t t = 0; t < row.size(); ++t) {
    const auto begin = static_cast<std::size_t>(row.get(t)) * width;
    for (std::size_t j = 0; j < 3; ++j)
      expected[begin + static_cast<std::size_t>(r.index.get(t * 3 + j))] += 1;
    for (std::size_t e = 0; e < width; ++e) expected[half + begin + e] += r.probs.get(t * width + e);
  }
  expect_close(stats.values(), expected, {1e-13, 0}, "stats");
  expect_booked(ex.ledger(), "row_balance_stats", T * (E + K), 4.0 * T * (E + K + 1), 8.0 * 2 * B * E);
  HostTensor none({2, 0, E}, DType::kF64);
  ops::row_balance_stats(ex, none, HostTensor({0, E}, DType::kF32), HostTensor({0, K}, DType::kI32),
                         HostTensor({0}, DType::kI32));
}

// Each token's own row of the balance terms' gradient: as if it were routed alone with that row.
TEST(BalanceRows, GradientsOfTheTerms) {
  OpExec ex;
  const std::int64_t T = 12, E = 13, K = 3;
  const HostTensor logits = random_tensor({T, E}, DType::kF32, 1),
                   dweight = random_tensor({T, K}, DType::kF32, 2),
                   aux = random_tensor({3, E}, DType::kF32, 3);
  const Routed r = route(logits, T, E, K, true);
  HostTensor row({T}, DType::kI32), by_row({T, E}, DType::kF32), whole({T, E}, DType::kF32);
  for (std::size_t t = 0; t < row.size(); ++t) row.set(t, static_cast<double>(t % 3));
  ops::route_tokens_backward(ex, by_row, dweight, {aux, row, 0.1f}, {r.probs, r.index, r.weight, r.lse},
                             true);
  for (std::size_t b = 0; b < 3; ++b) {
    HostTensor one({E}, DType::kF32);
    for (std::size_t e = 0; e < one.size(); ++e) one.set(e, aux.get(b * one.size() + e));
    ops::route_tokens_backward(ex, whole, dweight, {one, {}, 0.1f}, {r.probs, r.index, r.weight, r.lse},
                               true);
    for (std::size_t i = 0; i < whole.size(); ++i)
      if (i / one.size() % 3 == b) {
        EXPECT_EQ(by_row.get(i), whole.get(i)) << i;
      }
  }
}

TEST(BalanceRows, RefusesARowThatIsNot) {
  OpExec ex;
  const HostTensor row = filled({3}, DType::kI32, 2), index = filled({3, 1}, DType::kI32, 0),
                   probs = filled({3, 4}, DType::kF32, 0.25);
  HostTensor stats({2, 3, 4}, DType::kF64), wrong({2, 3, 5}, DType::kF64);
  ops::row_balance_stats(ex, stats, probs, index, row);
  EXPECT_EQ(stats.get(2 * 4), 3);
  EXPECT_THROW(ops::row_balance_stats(ex, wrong, probs, index, row), Error);
}

}  // namespace
}  // namespace upmoe::test
