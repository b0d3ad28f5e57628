#include "kernels/ops/embedding.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <limits>

#include "tests/support/op_exec.h"
#include "tests/support/random_tensor.h"
#include "tests/support/reference_linear.h"

namespace upmoe::test {
namespace {

HostTensor tokens_of(std::vector<std::int64_t> values) {
  HostTensor t({static_cast<std::int64_t>(values.size())}, DType::kI32);
  for (std::size_t i = 0; i < values.size(); ++i) t.set(i, static_cast<double>(values[i]));
  return t;
}

// Skewed: about half the positions hold one of two tokens.
HostTensor random_tokens(std::int64_t count, std::int64_t vocab) {
  std::mt19937 random(7);
  HostTensor t({count}, DType::kI32);
  for (std::size_t i = 0; i < t.size(); ++i) {
    const std::int64_t any = static_cast<std::int64_t>(random()) % vocab;
    t.set(i, static_cast<double>(random() % 2 == 0 ? any : any % std::min<std::int64_t>(2, vocab)));
  }
  return t;
}

struct Size {
  std::int64_t tokens, width, vocab;
};
// One, two and three digits of the sort; widths around a vector.
constexpr std::array kSizes = {Size{0, 4, 3},      Size{1, 1, 1},       Size{50, 33, 7}, Size{600, 16, 256},
                               Size{300, 40, 257}, Size{200, 5, 70000}, Size{64, 0, 9}};

struct Types {
  DType in, out;
};
constexpr std::array kTypes = {Types{DType::kF32, DType::kF32}, Types{DType::kBF16, DType::kBF16},
                               Types{DType::kBF16, DType::kF32}};

// Shards of the vocabulary: their embeddings add up to the whole one exactly, and each takes the gradient of
// its own rows.
TEST(Embedding, DividedVocabulary) {
  OpExec ex;
  for (const auto& [count, width, vocab] : kSizes)
    for (const std::int64_t ranks : {2, 3}) {
      if (vocab < ranks) continue;
      const HostTensor w = random_tensor({vocab, width}, DType::kF32, 1),
                       tokens = random_tokens(count, vocab),
                       dx = random_tensor({count, width}, DType::kF32, 2);
      HostTensor whole({count, width}, DType::kF32), dwhole = filled({vocab, width}, DType::kF32, 0.5);
      ops::embedding_forward(ex, whole, tokens, w);
      ops::embedding_backward(ex, dwhole, dx, tokens);
      std::vector<double> sum(whole.size(), 0.0), gradients;
      for (std::int64_t r = 0; r < ranks; ++r) {
        const std::int64_t begin = vocab * r / ranks, end = vocab * (r + 1) / ranks;
        const ConstTensorView rows = ConstTensorView(w).rows(begin, end);
        HostTensor x({count, width}, DType::kF32), dw = filled({end - begin, width}, DType::kF32, 0.5);
        ops::embedding_forward(ex, x, tokens, rows, {begin, vocab});
        ops::embedding_backward(ex, dw, dx, tokens, {begin, vocab});
        for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += x.get(i);
        for (std::size_t i = 0; i < dw.size(); ++i) gradients.push_back(dw.get(i));
      }
      EXPECT_EQ(sum, whole.values());
      EXPECT_EQ(gradients, dwhole.values());
    }
}

TEST(Embedding, ForwardCopiesRows) {
  OpExec ex;
  for (DType dtype : {DType::kF32, DType::kBF16})
    for (const auto& [count, width, vocab] : kSizes) {
      const HostTensor w = random_tensor({vocab, width}, dtype, 1), tokens = random_tokens(count, vocab);
      HostTensor x({count, width}, dtype);
      ops::embedding_forward(ex, x, tokens, w);
      for (std::int64_t t = 0; t < count; ++t)
        for (std::int64_t d = 0; d < width; ++d) {
          const auto token = static_cast<std::int64_t>(tokens.get(static_cast<std::size_t>(t)));
          ASSERT_EQ(x.get(static_cast<std::size_t>(t * width + d)),
                    w.get(static_cast<std::size_t>(token * width + d)));
        }
    }
}

// Rows of tokens that do not occur become zeros.
TEST(Embedding, BackwardOverwrites) {
  OpExec ex;
  for (Types types : kTypes)
    for (const auto& [count, width, vocab] : kSizes) {
      const HostTensor dx = random_tensor({count, width}, types.in, 1), tokens = random_tokens(count, vocab);
      const std::int64_t half = (vocab + 1) / 2;
      expect_overwrites({vocab, width}, types.out,
                        [&](const GradientView& dw) { ops::embedding_backward(ex, dw, dx, tokens); });
      expect_overwrites({half, width}, types.out, [&](const GradientView& dw) {
        ops::embedding_backward(ex, dw, dx, tokens, {vocab - half, vocab});
      });
    }
}

TEST(Embedding, BackwardAddsRows) {
  OpExec ex;
  for (Types types : kTypes)
    for (const auto& [count, width, vocab] : kSizes) {
      const HostTensor dx = random_tensor({count, width}, types.in, 1), tokens = random_tokens(count, vocab);
      HostTensor dw = random_tensor({vocab, width}, types.out, 2);
      ReferenceSums expected;
      expected.value = dw.values();
      for (double v : expected.value) expected.magnitude.push_back(std::abs(v));
      for (std::int64_t t = 0; t < count; ++t)
        for (std::int64_t d = 0; d < width; ++d) {
          const double v = dx.get(static_cast<std::size_t>(t * width + d));
          const auto token = static_cast<std::int64_t>(tokens.get(static_cast<std::size_t>(t)));
          expected.value[static_cast<std::size_t>(token * width + d)] += v;
          expected.magnitude[static_cast<std::size_t>(token * width + d)] += std::abs(v);
        }
      expected.terms = count + 1;
      ops::embedding_backward(ex, dw, dx, tokens);
      expect_sums(dw.values(), expected, types.out,
                  fmt::format("{} tokens, width {}, vocab {}", count, width, vocab));
    }
  EXPECT_EQ(ex.scratch_used(), 0u);
}

// Near 2^24 fp32 numbers are 2 apart and ties go to the even one: 1 + 1 + 2^24 + 1 becomes 2^24 + 4, the
// other way round it stays 2^24; and what dw holds comes first, or 2^24 + 1 + 1 would become 2^24 + 2.
TEST(Embedding, BackwardAddsInTokenOrder) {
  OpExec ex;
  const double big = std::ldexp(1.0, 24);
  HostTensor dw = tensor_of({3, 1}, DType::kF32, {0, big, 0});
  const HostTensor dx = tensor_of({6, 1}, DType::kF32, {1, 1, 1, 1, big, 1});
  ops::embedding_backward(ex, dw, dx, tokens_of({1, 2, 1, 2, 2, 2}));
  EXPECT_THAT(dw.values(), testing::ElementsAre(0, big, big + 4));
}

TEST(Embedding, BackwardIsTheSameForAnyNumberOfThreads) {
  const HostTensor dx = random_tensor({700, 64}, DType::kBF16, 1), tokens = random_tokens(700, 90);
  expect_same_for_any_threads([&] {
    OpExec ex;
    HostTensor dw = filled({90, 64}, DType::kF32, 0.5);
    ops::embedding_backward(ex, dw, dx, tokens);
    return dw;
  });
}

TEST(Embedding, NamesATokenOutsideTheVocabulary) {
  OpExec ex;
  HostTensor x({3, 2}, DType::kF32), w({5, 2}, DType::kF32);
  for (std::int64_t bad :
       {std::int64_t{5}, std::int64_t{-1}, std::int64_t{std::numeric_limits<std::int32_t>::min()}}) {
    const HostTensor tokens = tokens_of({0, bad, 4});
    for (const bool backward : {false, true}) try {
        backward ? ops::embedding_backward(ex, w, x, tokens) : ops::embedding_forward(ex, x, tokens, w);
        finish_ops();
        ADD_FAILURE() << "token " << bad << " was accepted";
      } catch (const Error& e) {
        EXPECT_EQ(e.code(), ExitCode::kBadInput);
        EXPECT_THAT(e.what(), testing::HasSubstr(fmt::format("token {} at position 1", bad)));
      }
  }
}

TEST(Embedding, RejectsWhatDoesNotFit) {
  OpExec ex;
  HostTensor x({3, 2}, DType::kF32), w({5, 2}, DType::kF32), tokens({3}, DType::kI32);
  EXPECT_NO_THROW(ops::embedding_forward(ex, x, tokens, w));
  EXPECT_THROW(ops::embedding_forward(ex, HostTensor({2, 2}, DType::kF32), tokens, w), Error);
  EXPECT_THROW(ops::embedding_forward(ex, HostTensor({3, 3}, DType::kF32), tokens, w), Error);
  EXPECT_THROW(ops::embedding_forward(ex, HostTensor({3, 2}, DType::kBF16), tokens, w), Error);
  EXPECT_THROW(ops::embedding_forward(ex, x, HostTensor({3}, DType::kI64), w), Error);
  EXPECT_THROW(ops::embedding_forward(ex, x, tokens, HostTensor({5}, DType::kF32)), Error);
  EXPECT_THROW(ops::embedding_backward(ex, HostTensor({5, 2}, DType::kBF16), x, tokens), Error);
  EXPECT_THROW(ops::embedding_backward(ex, HostTensor({5, 3}, DType::kF32), x, tokens), Error);
}

TEST(Embedding, BooksOnTheDryDevice) {
  OpExec dry(DeviceType::kDry);
  const TensorView x = dry_tensor({3, 2}, DType::kBF16), tokens = dry_tensor({3}, DType::kI32);
  ops::embedding_forward(dry, x, tokens, dry_tensor({9, 2}, DType::kBF16));
  ops::embedding_backward(dry, dry_tensor({9, 2}, DType::kF32), x, tokens);
  expect_booked(dry.ledger(), "embedding_forward", 0, 12 + 12, 12);
  expect_booked(dry.ledger(), "embedding_backward", 6, 12 + 12 + 24, 24);
  OpExec first(DeviceType::kDry);
  ops::embedding_backward(first, {dry_tensor({9, 2}, DType::kF32), Accumulate::kOverwrite}, x, tokens);
  expect_booked(first.ledger(), "embedding_backward", 6, 12 + 12 + 24, 24 + 9 * 2 * 4);
}

}  // namespace
}  // namespace upmoe::test
