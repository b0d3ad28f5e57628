#include "kernels/ops/pointwise.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>

#include "tests/support/op_exec.h"
#include "tests/support/random_tensor.h"

namespace upmoe::test {
namespace {

constexpr std::array kFloats = {DType::kF32, DType::kBF16};
// Around a vector of 16 lanes and a block of 8192 elements, and nothing at all.
constexpr std::array<std::int64_t, 7> kSizes = {0, 1, 15, 16, 33, 8192, 20011};

// Each op here rounds once, so the right answer is the exact one rounded: equality.
void expect_rounded(const HostTensor& actual, const std::function<double(std::size_t)>& exact,
                    const char* what) {
  HostTensor expected({static_cast<std::int64_t>(actual.size())}, ConstTensorView(actual).dtype);
  for (std::size_t i = 0; i < actual.size(); ++i) expected.set(i, exact(i));
  EXPECT_TRUE(actual == expected) << what << ", " << actual.size() << " elements";
}

TEST(Pointwise, FillsAndCasts) {
  OpExec ex;
  for (DType from : kFloats)
    for (DType to : kFloats)
      for (std::int64_t n : kSizes) {
        const HostTensor in = random_tensor({n}, from, 1);
        HostTensor out({n}, to);
        ops::cast(ex, out, in);
        expect_rounded(
            out, [&](std::size_t i) { return in.get(i); }, "cast");
        ops::fill(ex, out, 0.3f);
        expect_rounded(
            out, [](std::size_t) { return static_cast<double>(0.3f); }, "fill");
      }
}

TEST(Pointwise, ClipsAndMasksWhatWasBeyond) {
  OpExec ex;
  const float limit = 0.75f;
  for (DType dtype : kFloats)
    for (std::int64_t n : kSizes) {
      HostTensor in = random_tensor({n}, dtype, 1), dx = random_tensor({n}, dtype, 2), out({n}, dtype);
      if (n > 2) {  // on the limit itself, from both sides: not beyond
        in.set(0, limit);
        in.set(1, -limit);
        in.set(2, NAN);
      }
      const HostTensor dy = dx;
      ops::clip(ex, out, in, limit);
      ops::clip_backward(ex, dx, in, limit);
      for (std::size_t i = 0; i < in.size(); ++i) {
        if (std::isnan(in.get(i))) {
          EXPECT_TRUE(std::isnan(out.get(i)));
          EXPECT_EQ(dx.get(i), dy.get(i));
          continue;
        }
        EXPECT_EQ(out.get(i), std::clamp(in.get(i), -0.75, 0.75));
        EXPECT_EQ(dx.get(i), std::abs(in.get(i)) > 0.75 ? 0.0 : dy.get(i));
      }
    }
  HostTensor out({4}, DType::kF32), in({4}, DType::kF32), other({5}, DType::kF32);
  EXPECT_THROW(ops::clip(ex, out, in, 0.0f), Error);
  EXPECT_THROW(ops::clip(ex, other, in, 1.0f), Error);
}

// Transfers under way move on between ops.
TEST(Pointwise, PollsTheCommunicationStream) {
  struct CountingStream final : Stream {
    void poll() override { ++polls; }
    int polls = 0;
  } stream;
  Exec ex;
  float x[4] = {};
  ops::fill(ex, host_view(x, {4}), 1.0f);
  ex.stream = &stream;
  ops::fill(ex, host_view(x, {4}), 2.0f);
  ops::scale(ex, host_view(x, {4}), 2.0f);
  EXPECT_EQ(stream.polls, 2);
}

TEST(Pointwise, CastKeepsInfinityAndNanAndRoundsToEven) {
  OpExec ex;
  const double inf = INFINITY;
  const HostTensor in = tensor_of({6}, DType::kF32, {inf, -inf, NAN, 1 + 1.0 / 256, 1 + 3.0 / 256, -0.0});
  HostTensor out({6}, DType::kBF16);
  ops::cast(ex, out, in);
  EXPECT_EQ(out.get(0), inf);
  EXPECT_EQ(out.get(1), -inf);
  EXPECT_TRUE(std::isnan(out.get(2)));
  EXPECT_EQ(out.get(3), 1.0);            // the middle of 1 and 1 + 2/256
  EXPECT_EQ(out.get(4), 1 + 4.0 / 256);  // the middle of 1 + 2/256 and 1 + 4/256
  EXPECT_TRUE(std::signbit(out.get(5)));
}

TEST(Pointwise, CastCopiesIntegers) {
  OpExec ex;
  const HostTensor in = tensor_of({3}, DType::kI64, {1, -2, 1e15});
  HostTensor out({3}, DType::kI64);
  ops::cast(ex, out, in);
  EXPECT_TRUE(out == in);
  EXPECT_THROW(ops::cast(ex, HostTensor({3}, DType::kF32), in), Error);
}

TEST(Pointwise, AddsAlsoInPlace) {
  OpExec ex;
  for (DType dtype : kFloats)
    for (std::int64_t n : kSizes) {
      const HostTensor a = random_tensor({n}, dtype, 1), b = random_tensor({n}, dtype, 2);
      const auto sum = [&](std::size_t i) {
        return static_cast<double>(static_cast<float>(a.get(i) + b.get(i)));
      };
      HostTensor out({n}, dtype), over_a = a, over_b = b, twice = a;
      ops::add(ex, out, a, b);
      expect_rounded(out, sum, "add");
      ops::add(ex, over_a, over_a, b);
      EXPECT_TRUE(over_a == out);
      ops::add(ex, over_b, a, over_b);
      EXPECT_TRUE(over_b == out);
      ops::add(ex, twice, twice, twice);
      expect_rounded(
          twice, [&](std::size_t i) { return 2 * a.get(i); }, "a + a");
    }
}

TEST(Pointwise, Scales) {
  OpExec ex;
  for (DType dtype : kFloats)
    for (std::int64_t n : kSizes) {
      const HostTensor before = random_tensor({n}, dtype, 1);
      HostTensor x = before;
      ops::scale(ex, x, 1.7f);
      expect_rounded(
          x, [&](std::size_t i) { return static_cast<double>(static_cast<float>(before.get(i)) * 1.7f); },
          "scale");
    }
}

TEST(Pointwise, SumsInDouble) {
  OpExec ex;
  for (DType dtype : kFloats)
    for (std::int64_t n : kSizes) {
      const HostTensor x = random_tensor({n}, dtype, 1, 1, 0.5);
      double sum = 3, squares = 3;
      for (double v : x.values()) sum += v, squares += v * v;
      // n roundings of 2^-53 each; every partial sum is below the sum of absolute values, itself below
      // squares + n.
      const double allowed =
          static_cast<double>(n + 1) * std::ldexp(1.0, -53) * (squares + static_cast<double>(n));
      HostTensor out = filled({1}, DType::kF64, 3);
      ops::sum_of_squares(ex, out, ops::only(x));
      EXPECT_NEAR(out.get(0), squares, allowed);
      if (dtype == DType::kBF16) continue;
      out.set(0, 3);
      ops::sum(ex, out, x);
      EXPECT_NEAR(out.get(0), sum, allowed);
    }
  EXPECT_EQ(ex.scratch_used(), 0u);
}

TEST(Pointwise, SumsAreTheSameForAnyNumberOfThreads) {
  const HostTensor x = random_tensor({100003}, DType::kF32, 1);
  for (const bool squares : {true, false})
    expect_same_for_any_threads([&] {
      OpExec ex;
      HostTensor out = filled({1}, DType::kF64, 0);
      squares ? ops::sum_of_squares(ex, out, ops::only(x)) : ops::sum(ex, out, x);
      return out;
    });
}

// Whole blocks in wide loads, or element by element: the same order, so the same bits.
TEST(Pointwise, SumsDoNotDependOnWhereElementsLie) {
  OpExec ex;
  for (DType dtype : kFloats)
    for (const std::int64_t n : {65536, 2 * 65536 + 77}) {
      const HostTensor x = random_tensor({n + 1}, dtype, 1);
      HostTensor behind({n}, dtype), out = filled({1}, DType::kF64, 0), expected = out;
      for (std::size_t i = 0; i < behind.size(); ++i) behind.set(i, x.get(i + 1));
      const ConstTensorView odd = ConstTensorView(x).rows(1, n + 1), even = behind;
      ops::sum_of_squares(ex, out, ops::only(odd));
      ops::sum_of_squares(ex, expected, ops::only(even));
      EXPECT_EQ(out.get(0), expected.get(0)) << name_of(dtype) << ' ' << n;
    }
}

TEST(Pointwise, SquaresOfSeveralTensors) {
  OpExec ex;
  const HostTensor one = random_tensor({70001}, DType::kF32, 1), two = random_tensor({3, 5}, DType::kBF16, 2),
                   none({0}, DType::kF32);
  const std::vector<ConstTensorView> parts{one, none, two};
  HostTensor together = filled({1}, DType::kF64, 7), apart = filled({1}, DType::kF64, 7);
  ops::sum_of_squares(ex, together, parts);
  for (const ConstTensorView& x : parts) ops::sum_of_squares(ex, apart, ops::only(x));
  EXPECT_NEAR(together.get(0), apart.get(0), 1e-9 * apart.get(0));
  ops::sum_of_squares(ex, apart, std::span<const ConstTensorView>());
  EXPECT_NEAR(together.get(0), apart.get(0), 1e-9 * apart.get(0));
}

// More than a launch takes, of two types, some of none and some of several blocks: each once.
TEST(Pointwise, SquaresOfManyTensors) {
  OpExec ex;
  std::vector<HostTensor> tensors;
  for (unsigned i = 0; i < 200; ++i)
    tensors.push_back(random_tensor({i % 50 == 49 ? 70001 : i % 7 * 11}, kFloats[i % 3 % 2], i));
  std::vector<ConstTensorView> parts;
  double squares = 0;
  for (const HostTensor& t : tensors) {
    parts.emplace_back(t);
    for (const double v : t.values()) squares += v * v;
  }
  HostTensor out = filled({1}, DType::kF64, 0);
  ops::sum_of_squares(ex, out, parts);
  EXPECT_NEAR(out.get(0), squares, 1e-9 * squares);
  EXPECT_EQ(ex.scratch_used(), 0u);
}

TEST(Pointwise, SumOfSquaresDoesNotOverflow) {
  OpExec ex;
  const HostTensor x = filled({4}, DType::kF32, 1e30);
  HostTensor out = filled({1}, DType::kF64, 0);
  ops::sum_of_squares(ex, out, ops::only(x));
  EXPECT_NEAR(out.get(0), 4e60, 1e54);
}

TEST(Pointwise, RejectsWhatDoesNotFit) {
  OpExec ex;
  HostTensor x({4}, DType::kF32), longer({5}, DType::kF32), narrow({4}, DType::kBF16),
      integers({4}, DType::kI32);
  HostTensor sum({1}, DType::kF64), wrong_sum({1}, DType::kF32), two({2}, DType::kF64);
  EXPECT_THROW(ops::fill(ex, integers, 0), Error);
  EXPECT_THROW(ops::scale(ex, integers, 2), Error);
  EXPECT_THROW(ops::cast(ex, longer, x), Error);
  EXPECT_THROW(ops::cast(ex, integers, x), Error);
  EXPECT_THROW(ops::add(ex, x, x, longer), Error);
  EXPECT_THROW(ops::add(ex, x, x, narrow), Error);
  EXPECT_THROW(ops::add(ex, longer, x, x), Error);
  EXPECT_THROW(ops::sum_of_squares(ex, wrong_sum, ops::only(x)), Error);
  EXPECT_THROW(ops::sum_of_squares(ex, two, ops::only(x)), Error);
  EXPECT_THROW(ops::sum_of_squares(ex, sum, ops::only(integers)), Error);
  EXPECT_THROW(ops::sum(ex, sum, narrow), Error);
  EXPECT_THROW(ops::fill(ex, dry_tensor({4}, DType::kF32), 0), Error);
}

TEST(Pointwise, BooksOnTheDryDevice) {
  OpExec dry(DeviceType::kDry);
  const TensorView x = dry_tensor({4, 2}, DType::kF32), narrow = dry_tensor({4, 2}, DType::kBF16);
  const TensorView sum = dry_tensor({1}, DType::kF64);
  ops::fill(dry, x, 1);
  ops::cast(dry, narrow, x);
  ops::add(dry, x, x, x);
  ops::scale(dry, x, 2);
  ops::clip(dry, x, x, 2);
  ops::clip_backward(dry, x, x, 2);
  ops::sum_of_squares(dry, sum, ops::only(narrow));
  ops::sum(dry, sum, x);
  expect_booked(dry.ledger(), "fill", 0, 0, 32);
  expect_booked(dry.ledger(), "cast", 0, 32, 16);
  expect_booked(dry.ledger(), "add", 8, 64, 32);
  expect_booked(dry.ledger(), "scale", 8, 32, 32);
  expect_booked(dry.ledger(), "clip", 8, 32, 32);
  expect_booked(dry.ledger(), "clip_backward", 8, 64, 32);
  expect_booked(dry.ledger(), "sum_of_squares", 16, 16 + 8, 8);
  expect_booked(dry.ledger(), "sum", 8, 32 + 8, 8);
}

}  // namespace
}  // namespace upmoe::test
