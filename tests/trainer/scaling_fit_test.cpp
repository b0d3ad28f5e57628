// Laws of losses: the numbers that made them come back, noise does little, and runs that tell too little are refused.

#include "trainer/cost/scaling_fit.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>

#include "kernels/core/check.h"
#include "trainer/cost/least_squares.h"

namespace upmoe {
namespace {

using ::testing::HasSubstr;

double number(const ScalingFit& fit, const std::string& name) {
  for (const FittedNumber& n : fit.numbers)
    if (n.name == name) return n.value;
  ADD_FAILURE() << "no " << name << " in " << fit.law;
  return 0;
}

std::string refusal(const std::vector<RunOutcome>& runs) {
  try {
    fit_scaling(runs);
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ExitCode::kUsage);
    return e.what();
  }
  ADD_FAILURE() << "no error";
  return "";
}

RunOutcome run(double size, double tokens, double loss) {
  return {fmt::format("{}_{}", size, tokens), size, tokens, {}, loss, true};
}

std::vector<RunOutcome> by_size_and_tokens(const std::function<double(double, double)>& loss) {
  std::vector<RunOutcome> runs;
  for (const double size : {1e6, 4e6, 1.6e7, 6.4e7})
    for (const double tokens : {1e8, 1e9, 1e10}) runs.push_back(run(size, tokens, loss(size, tokens)));
  return runs;
}

double of_chinchilla(double size, double tokens) {  // its published numbers
  return 1.69 + 406.4 * std::pow(size, -0.34) + 410.7 * std::pow(tokens, -0.28);
}

TEST(ScalingFit, FindsTheNumbersThatMadeTheLosses) {
  const ScalingFit fit = fit_scaling(by_size_and_tokens(of_chinchilla));
  EXPECT_EQ(fit.law, "L = E + A N^-a + B D^-b");
  EXPECT_NEAR(number(fit, "E"), 1.69, 1e-3);
  EXPECT_NEAR(number(fit, "A"), 406.4, 1);
  EXPECT_NEAR(number(fit, "a"), 0.34, 1e-4);
  EXPECT_NEAR(number(fit, "B"), 410.7, 1);
  EXPECT_NEAR(number(fit, "b"), 0.28, 1e-4);
  EXPECT_LT(fit.rms, 1e-5);
  EXPECT_THAT(fit.remarks, testing::ElementsAre(HasSubstr("N as C^0.452, D as C^0.548")));
  for (const FittedNumber& n : fit.numbers) {
    ASSERT_TRUE(n.range) << n.name;
    EXPECT_NEAR(n.range->first / n.value, 1, 0.02) << n.name;
    EXPECT_NEAR(n.range->second / n.value, 1, 0.02) << n.name;
  }
}

TEST(ScalingFit, NoiseShowsInResidualsAndRanges) {
  int i = 0;
  const ScalingFit fit = fit_scaling(by_size_and_tokens(
      [&](double n, double d) { return of_chinchilla(n, d) + (i++ % 2 == 0 ? 0.01 : -0.01); }));
  EXPECT_NEAR(fit.rms, 0.01, 0.004);
  EXPECT_NEAR(number(fit, "b"), 0.28, 0.03);
  const std::pair<double, double> e = *fit.numbers.front().range;
  EXPECT_LT(e.first + 1e-3, e.second);
  EXPECT_LE(e.first, number(fit, "E"));
}

TEST(ScalingFit, NoTermIsBelowZero) {
  const ScalingFit fit = fit_scaling(by_size_and_tokens(
      [](double n, double d) { return 2 + 1e-3 * std::log(n) + 410.7 * std::pow(d, -0.28); }));
  EXPECT_EQ(number(fit, "A"), 0) << "a larger model lost more";
  EXPECT_NEAR(number(fit, "b"), 0.28, 0.03);
}

TEST(ScalingFit, WhatIsTheSameInAllRunsHasNoTerm) {
  std::vector<RunOutcome> runs;
  for (const double tokens : {1e7, 1e8, 1e9, 1e10})
    runs.push_back(run(1e6, tokens, of_chinchilla(1e6, tokens)));
  const ScalingFit fit = fit_scaling(runs);
  EXPECT_EQ(fit.law, "L = E + B D^-b");
  EXPECT_NEAR(number(fit, "b"), 0.28, 1e-4);
  EXPECT_NEAR(number(fit, "E"), 1.69 + 406.4 * std::pow(1e6, -0.34), 1e-3);
  EXPECT_THAT(fit.remarks, testing::ElementsAre(HasSubstr("all runs have one size")));
  EXPECT_FALSE(fit.numbers.front().range) << "four runs, three numbers";
}

TEST(ScalingFit, OfUpcyclingFindsTheInteraction) {
  std::vector<RunOutcome> runs;
  const double E = 1.5, A = 90, p = 0.12, q = 0.15, r = 0.003;
  for (const double before : {1e8, 1e9, 1e10})
    for (const double after : {1e8, 4e8, 1.6e9}) {
      const double loss = E + A * std::pow(before, -p) * std::pow(after, -q + r * std::log(before));
      runs.push_back({fmt::format("{}_{}", before, after), 1e6, after, before, loss, true});
    }
  const ScalingFit fit = fit_scaling(runs);
  EXPECT_NEAR(number(fit, "E"), E, 5e-3);
  EXPECT_NEAR(number(fit, "p"), p, 2e-3);
  EXPECT_NEAR(number(fit, "q"), q, 2e-3);
  EXPECT_NEAR(number(fit, "r"), r, 1e-4);
  EXPECT_NEAR(number(fit, "A") / A, 1, 0.02);
  ASSERT_EQ(fit.remarks.size(), 2u);
  EXPECT_THAT(fit.remarks[0], HasSubstr("1e+10 tokens of the source"));
  EXPECT_THAT(fit.remarks[1], HasSubstr("would gain nothing"));
}

TEST(ScalingFit, RefusesWhatTellsTooLittle) {
  const auto some = [](std::size_t n) {
    std::vector<RunOutcome> all = by_size_and_tokens(of_chinchilla);
    all.erase(all.begin() + static_cast<std::ptrdiff_t>(n), all.end());
    return all;
  };
  EXPECT_THAT(refusal(some(1)), HasSubstr("nothing to fit"));
  EXPECT_THAT(refusal(some(3)), HasSubstr("has 3 numbers; found 3 runs"));
  EXPECT_THAT(refusal(some(6)), HasSubstr("2 different sizes, expected at least 3"));
  std::vector<RunOutcome> mixed = some(12);
  mixed[5].held_out = false;
  EXPECT_THAT(refusal(mixed), HasSubstr("has held-out losses"));
  std::vector<RunOutcome> upcycled = some(12);
  for (RunOutcome& r : upcycled) r.source_tokens = 1e9;
  EXPECT_THAT(refusal(upcycled), HasSubstr("of one size"));
  for (RunOutcome& r : upcycled) r.size = 1e6;
  EXPECT_THAT(refusal(upcycled), HasSubstr("tokens of their sources"));
}

TEST(ScalingFit, TakesTheSizeFromWhatATokenCosts) {
  RunCurve curve{
      .name = "x", .spent = {.tokens = 1000, .flops = 6e9, .seconds = 1}, .held_out = true, .points = {}};
  curve.points.push_back({curve.spent, 3.5});
  const RunOutcome alone = outcome_of(curve, nullptr), upcycled = outcome_of(curve, &curve);
  EXPECT_EQ(alone.size, 1e6);
  RunCurve taught = curve;
  taught.spent.flops += taught.teacher_flops = 3e9;
  EXPECT_EQ(outcome_of(taught, nullptr).size, 1e6) << "a model that learns from another one is no larger";
  EXPECT_EQ(alone.loss, 3.5);
  EXPECT_FALSE(alone.source_tokens);
  EXPECT_EQ(upcycled.source_tokens, 1000);
}

TEST(LeastSquares, WithWeightsAndChosenColumns) {
  const std::vector<std::vector<double>> x{{1, 0}, {1, 1}, {1, 2}, {1, 3}};
  const std::vector<double> y{1, 3, 5, 100};
  EXPECT_NEAR((*least_squares(x, y, {1, 1, 1, 0}, 0b11))[1], 2, 1e-12);
  EXPECT_NEAR((*least_squares(x, y, {}, 0b01))[0], 27.25, 1e-12);
  EXPECT_EQ((*least_squares(x, y, {}, 0b01))[1], 0);
  EXPECT_FALSE(least_squares({{1, 2}, {2, 4}}, {1, 2}, {}, 0b11));
}

TEST(Minimum, OfACurvedValley) {
  const auto f = [](const std::vector<double>& at) {
    return std::pow(1 - at[0], 2) + 100 * std::pow(at[1] - at[0] * at[0], 2);
  };
  const std::vector<double> at = minimum(f, {-3, -3}, {3, 3});
  EXPECT_NEAR(at[0], 1, 1e-4);
  EXPECT_NEAR(at[1], 1, 1e-4);
}

}  // namespace
}  // namespace upmoe
