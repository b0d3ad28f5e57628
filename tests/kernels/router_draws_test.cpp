#include "kernels/ops/router_draws.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/support/op_exec.h"
#include "tests/support/random_tensor.h"
#include "tests/support/reference_model.h"
#include "tests/support/tolerance.h"

namespace upmoe::test {
namespace {

HostTensor places(std::int64_t tokens, std::int64_t first = 0) {
  HostTensor place({tokens}, DType::kI32);
  for (std::size_t t = 0; t < place.size(); ++t)
    place.set(t, static_cast<double>(first) + static_cast<double>(t));
  return place;
}

HostTensor second(const HostTensor& index, const HostTensor& weight, const TokenDraws& draws) {
  OpExec ex;
  HostTensor kept(ConstTensorView(index).shape, DType::kI32);
  ops::draw_second(ex, kept, index, weight, draws);
  finish_ops();
  return kept;
}

HostTensor jittered(const HostTensor& x, const TokenDraws& draws, float amount) {
  OpExec ex;
  HostTensor y(ConstTensorView(x).shape, ConstTensorView(x).dtype);
  ops::jitter(ex, y, x, draws, amount, Accumulate::kOverwrite);
  finish_ops();
  return y;
}

// Every weight of a second choice, often: the share that is kept is twice the weight, and at 0.5 all of them are.
TEST(RouterDraws, SecondChoicesAreKeptWithTwiceTheirWeight) {
  const std::int64_t T = 20000;
  for (const double w : {0.0, 0.05, 0.2, 0.45, 0.5}) {
    HostTensor index({T, 2}, DType::kI32), weight({T, 2}, DType::kF32);
    for (std::size_t t = 0; t < static_cast<std::size_t>(T); ++t) {
      index.set(2 * t, static_cast<double>(t % 7));
      index.set(2 * t + 1, static_cast<double>((t + 3) % 7));
      weight.set(2 * t, 1 - w);
      weight.set(2 * t + 1, w);
    }
    const HostTensor place = places(T), kept = second(index, weight, {5, 1u << 20, 3, place});
    double count = 0;
    for (std::size_t t = 0; t < static_cast<std::size_t>(T); ++t) {
      EXPECT_EQ(kept.get(2 * t), index.get(2 * t)) << "a first choice stays";
      if (kept.get(2 * t + 1) < 0) continue;
      EXPECT_EQ(kept.get(2 * t + 1), index.get(2 * t + 1));
      ++count;
    }
    const double share = 2 * w, deviation = std::sqrt(share * (1 - share) / static_cast<double>(T));
    EXPECT_NEAR(count / static_cast<double>(T), share, 5 * deviation);
  }
}

// By the contract's counters, in double.
TEST(RouterDraws, JitterIsAFactorOfEachElement) {
  for (const DType dtype : {DType::kF32, DType::kBF16})
    for (const std::int64_t D : {1, 4, 7, 64}) {
      const std::int64_t T = 33;
      const HostTensor x = random_tensor({T, D}, dtype, 1), place = places(T, 100);
      const TokenDraws draws{9, 77, 2, place};
      const HostTensor y = jittered(x, draws, 0.25f);
      Values expected;
      for (std::uint64_t t = 0; t < 33; ++t)
        for (std::uint32_t i = 0; i < static_cast<std::uint32_t>(D); ++i) {
          const double u = static_cast<double>(uniform_from_bits(router_bits(9, 77 + 100 + t, 2, i)));
          expected.push_back(x.get(t * static_cast<std::size_t>(D) + i) * (1 + 0.25 * (2 * u - 1)));
        }
      expect_close(y.values(), expected, dtype == DType::kF32 ? Tolerance{1e-6, 1e-7} : Tolerance{5e-3, 1e-3},
                   "y");
      OpExec ex;
      HostTensor sum = x;
      ops::jitter(ex, sum, x, draws, 0.25f, Accumulate::kAdd);
      finish_ops();
      for (std::size_t i = 0; i < expected.size(); ++i) expected[i] += x.get(i);
      expect_close(sum.values(), expected,
                   dtype == DType::kF32 ? Tolerance{1e-6, 1e-6} : Tolerance{1e-2, 5e-3}, "sum");
    }
}

// A token's draws are its own: whatever rows lie with it, in whichever order; another layer or key draws others.
TEST(RouterDraws, DependOnTheTokenAlone) {
  const std::int64_t T = 40, D = 12;
  HostTensor ones = filled({T, D}, DType::kF32, 1.0), backwards({T}, DType::kI32);
  for (std::size_t t = 0; t < static_cast<std::size_t>(T); ++t) backwards.set(t, static_cast<double>(39 - t));
  const HostTensor forwards = places(T);
  const Values one = jittered(ones, {1, 0, 0, forwards}, 0.5f).values(),
               other = jittered(ones, {1, 0, 0, backwards}, 0.5f).values(),
               later = jittered(ones, {1, 8, 0, forwards}, 0.5f).values();
  for (std::size_t t = 0; t < static_cast<std::size_t>(T); ++t)
    for (std::size_t i = 0; i < static_cast<std::size_t>(D); ++i) {
      EXPECT_EQ(one[t * 12 + i], other[(39 - t) * 12 + i]);
      if (t < 8) continue;
      EXPECT_EQ(one[t * 12 + i], later[(t - 8) * 12 + i]) << "the eighth token, numbered from 8 on";
    }
  EXPECT_NE(one, jittered(ones, {2, 0, 0, forwards}, 0.5f).values());
  EXPECT_NE(one, jittered(ones, {1, 0, 1, forwards}, 0.5f).values());
  EXPECT_EQ(jittered(ones, {1, 0, 0, forwards}, 0.0f).values(), ones.values());
}

TEST(RouterDraws, Books) {
  const HostTensor x = random_tensor({8, 6}, DType::kF32, 1), place = places(8);
  HostTensor y({8, 6}, DType::kF32), kept({8, 2}, DType::kI32);
  HostTensor index = filled({8, 2}, DType::kI32, 1), weight = filled({8, 2}, DType::kF32, 0.5);
  OpExec ex;
  ops::jitter(ex, y, x, {1, 0, 0, place}, 0.1f, Accumulate::kOverwrite);
  ops::draw_second(ex, kept, index, weight, {1, 0, 0, place});
  finish_ops();
  expect_booked(ex.ledger(), "jitter", 48, 4.0 * (48 + 8), 4.0 * 48);
  expect_booked(ex.ledger(), "draw_second", 0, 4.0 * (16 + 16 + 8), 4.0 * 16);
}

}  // namespace
}  // namespace upmoe::test
