#include "trainer/sampling.h"

#include <gtest/gtest.h>

#include <cmath>
#include <set>
#include <vector>

#include "kernels/core/check.h"

namespace upmoe {
namespace {

constexpr int kDraws = 20000;

std::vector<double> shares(const std::vector<float>& logits, const SamplingRule& rule) {
  std::vector<double> share(logits.size());
  for (int i = 0; i < kDraws; ++i)
    ++share[static_cast<std::size_t>(next_token(logits, rule, {i % 7, i / 7}))];
  for (double& s : share) s /= kDraws;
  return share;
}

// Of probabilities, each within five deviations of a share.
void expect_shares(const std::vector<double>& found, const std::vector<double>& expected) {
  for (std::size_t v = 0; v < expected.size(); ++v) {
    const double p = expected[v];
    EXPECT_NEAR(found[v], p, 5 * std::sqrt(p * (1 - p) / kDraws)) << "token " << v;
  }
}

std::vector<float> logs(const std::vector<double>& p) {
  std::vector<float> logits;
  for (const double x : p) logits.push_back(static_cast<float>(std::log(x) + 3));
  return logits;
}

TEST(Sampling, GreedyTakesTheFirstOfEquals) {
  EXPECT_EQ(next_token(std::vector<float>{1, 3, 2, 3}, {}, {}), 1);
  EXPECT_EQ(next_token(std::vector<float>{-INFINITY, -5, -5}, {}, {}), 1);
}

TEST(Sampling, FollowsTheProbabilities) {
  const std::vector<double> p{0.1, 0.5, 0.05, 0.35};
  expect_shares(shares(logs(p), {.temperature = 1}), p);
  // At temperature 1/2 the squares, renormalised.
  const double sum = 0.01 + 0.25 + 0.0025 + 0.1225;
  expect_shares(shares(logs(p), {.temperature = 0.5}), {0.01 / sum, 0.25 / sum, 0.0025 / sum, 0.1225 / sum});
}

TEST(Sampling, KeepsTheLikeliest) {
  const std::vector<double> p{0.1, 0.5, 0.05, 0.35};
  expect_shares(shares(logs(p), {.temperature = 1, .top_k = 2}), {0, 0.5 / 0.85, 0, 0.35 / 0.85});
  expect_shares(shares(logs(p), {.temperature = 1, .top_k = 9}), p);
  expect_shares(shares(logs(p), {.temperature = 1, .top_k = 1}), {0, 1, 0, 0});
  expect_shares(shares(std::vector<float>{2, 2, 2}, {.temperature = 1, .top_k = 2}), {0.5, 0.5, 0});
}

TEST(Sampling, KeepsTheFewestWithAShare) {
  const std::vector<double> p{0.1, 0.5, 0.05, 0.35};
  expect_shares(shares(logs(p), {.temperature = 1, .top_p = 0.8}), {0, 0.5 / 0.85, 0, 0.35 / 0.85});
  expect_shares(shares(logs(p), {.temperature = 1, .top_p = 0.9}), {0.1 / 0.95, 0.5 / 0.95, 0, 0.35 / 0.95});
  expect_shares(shares(logs(p), {.temperature = 1, .top_p = 1e-9}), {0, 1, 0, 0});
  // Of the two that top_k leaves, 0.59 and 0.41, the first alone has half.
  expect_shares(shares(logs(p), {.temperature = 1, .top_k = 2, .top_p = 0.5}), {0, 1, 0, 0});
}

TEST(Sampling, GoesBySeedRowAndPosition) {
  const std::vector<float> logits(1000);
  const auto drawn = [&](std::uint64_t seed, std::int64_t row, std::int64_t position) {
    return next_token(logits, {.temperature = 1, .seed = seed}, {row, position});
  };
  EXPECT_EQ(drawn(1, 2, 3), drawn(1, 2, 3));
  std::set<std::int32_t> different;
  for (std::int64_t i = 0; i < 20; ++i) {
    different.insert(drawn(static_cast<std::uint64_t>(i), 0, 0));
    different.insert(drawn(100, i, 1));
    different.insert(drawn(100, 0, 100 + i));
  }
  EXPECT_GT(different.size(), 50u);
}

TEST(Sampling, RefusesWhatIsNoNumber) {
  for (const std::vector<float>& logits :
       {std::vector<float>{1, NAN}, {NAN, 1}, {1, INFINITY}, {-INFINITY, -INFINITY}, {}})
    for (const double temperature : {0.0, 1.0}) {
      try {
        next_token(logits, {.temperature = temperature}, {4, 17});
        FAIL();
      } catch (const Error& e) {
        EXPECT_EQ(e.code(), ExitCode::kNumeric);
        EXPECT_NE(std::string(e.what()).find("row 4, position 17"), std::string::npos);
      }
    }
}

}  // namespace
}  // namespace upmoe
