#include "trainer/cost/scaling_fit.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "kernels/core/check.h"
#include "trainer/cost/least_squares.h"

namespace upmoe {

namespace {

constexpr double kSame = 0.02;  // values closer than that count as one
constexpr double kLeastPower = 0.01, kLargestPower = 4;
constexpr double kNever = std::numeric_limits<double>::infinity();

using Quantity = double (*)(const RunOutcome&);

std::size_t values_of(const std::vector<RunOutcome>& runs, Quantity quantity) {
  std::vector<double> all;
  for (const RunOutcome& r : runs) all.push_back(quantity(r));
  std::sort(all.begin(), all.end());
  std::size_t different = 1;
  for (std::size_t i = 1, first = 0; i < all.size(); ++i)
    if (all[i] > all[first] * (1 + kSame)) {
      ++different;
      first = i;
    }
  return different;
}

double geometric_mean(const std::vector<RunOutcome>& runs, Quantity quantity) {
  double sum = 0;
  for (const RunOutcome& r : runs) sum += std::log(quantity(r));
  return std::exp(sum / static_cast<double>(runs.size()));
}

// What a fit is before anybody asks how sure it is: its numbers, by the names of the law, and what it predicts.
struct Solution {
  std::vector<double> numbers;
  std::vector<double> predicted;
  double error = kNever;  // sum of squares
};

void judge(Solution& s, const std::vector<RunOutcome>& runs) {
  s.error = 0;
  for (std::size_t i = 0; i < runs.size(); ++i) s.error += std::pow(runs[i].loss - s.predicted[i], 2);
}

// A law: what it is called, its numbers, and how they are found.
struct Law {
  std::string words;
  std::vector<std::string> names;
  std::function<Solution(const std::vector<RunOutcome>&)> solve;
};

struct Term {
  const char *amplitude, *power;
  Quantity quantity;
};

// Of given powers the best amplitudes, none below zero: of every choice of terms that are there at all.
Solution with_powers(const std::vector<RunOutcome>& runs, const std::vector<Term>& terms,
                     const std::vector<double>& powers) {
  const std::size_t columns = terms.size() + 1;
  std::vector<std::vector<double>> x(runs.size(), std::vector<double>(columns, 1));
  std::vector<double> y, scale(columns, 1);
  for (std::size_t t = 0; t < terms.size(); ++t) {
    const double middle = geometric_mean(runs, terms[t].quantity);  // keeps the columns of one size
    scale[t + 1] = std::pow(middle, powers[t]);
    for (std::size_t i = 0; i < runs.size(); ++i)
      x[i][t + 1] = std::pow(terms[t].quantity(runs[i]) / middle, -powers[t]);
  }
  for (const RunOutcome& r : runs) y.push_back(r.loss);
  Solution best;
  for (unsigned chosen = 1; chosen < 1u << columns; ++chosen) {
    const std::optional<std::vector<double>> c = least_squares(x, y, {}, chosen);
    if (!c || std::any_of(c->begin(), c->end(), [](double v) { return v < 0; })) continue;
    Solution s;
    for (std::size_t i = 0; i < runs.size(); ++i) {
      double sum = 0;
      for (std::size_t k = 0; k < columns; ++k) sum += (*c)[k] * x[i][k];
      s.predicted.push_back(sum);
    }
    judge(s, runs);
    if (s.error >= best.error) continue;
    s.numbers = {c->front()};
    for (std::size_t t = 0; t < terms.size(); ++t) {
      s.numbers.push_back((*c)[t + 1] * scale[t + 1]);
      s.numbers.push_back(powers[t]);
    }
    best = std::move(s);
  }
  return best;
}

Solution solve_sum(const std::vector<RunOutcome>& runs, const std::vector<Term>& terms) {
  const auto powers_of = [](const std::vector<double>& at) {
    std::vector<double> powers;
    for (const double v : at) powers.push_back(std::clamp(std::exp(v), kLeastPower, kLargestPower));
    return powers;
  };
  const auto error = [&](const std::vector<double>& at) {
    return with_powers(runs, terms, powers_of(at)).error;
  };
  const std::vector<double> lowest(terms.size(), std::log(kLeastPower)),
      highest(terms.size(), std::log(kLargestPower));
  return with_powers(runs, terms, powers_of(minimum(error, lowest, highest)));
}

// With E given, ln (L - E) is linear in ln D1, ln D2 and their product. Weights make of residuals there those of L.
Solution with_floor(const std::vector<RunOutcome>& runs, double floor) {
  const double x0 = std::log(geometric_mean(runs, [](const RunOutcome&r) { return *r.source_tokens; })),
               y0 = std::log(geometric_mean(runs, [](const RunOutcome&r) { return r.tokens; }));
  std::vector<std::vector<double>> rows;
  std::vector<double> logs, weights;
  for (const RunOutcome& r : runs) {
    const double u = std::log(*r.source_tokens) - x0, v = std::log(r.tokens) - y0;
    rows.push_back({1, u, v, u * v});
    logs.push_back(std::log(r.loss - floor));
    weights.push_back(std::pow(r.loss - floor, 2));
  }
  Solution s;
  const std::optional<std::vector<double>> c = least_squares(rows, logs, weights, 0b1111);
  if (!c) return s;
  for (const std::vector<double>& row : rows) {
    double sum = 0;
    for (std::size_t k = 0; k < row.size(); ++k) sum += (*c)[k] * row[k];
    s.predicted.push_back(floor + std::exp(sum));
  }
  judge(s, runs);
  // (u, v) back to (ln D1, ln D2).
  const double c0 = (*c)[0], c1 = (*c)[1], c2 = (*c)[2], c3 = (*c)[3];
  s.numbers = {floor, std::exp(c0 - c1 * x0 - c2 * y0 + c3 * x0 * y0), -(c1 - c3 * y0), -(c2 - c3 * x0), c3};
  return s;
}

Solution solve_upcycling(const std::vector<RunOutcome>& runs) {
  double least = kNever;
  for (const RunOutcome& r : runs) least = std::min(least, r.loss);
  // Searched for: how far the lowest loss is above E, as the logarithm of its share.
  const auto floor_of = [&](double at) { return least * (1 - std::exp(std::min(at, 0.0))); };
  const auto error = [&](const std::vector<double>& at) { return with_floor(runs, floor_of(at[0])).error; };
  return with_floor(runs, floor_of(minimum(error, {std::log(1e-4)}, {0.0})[0]));
}

void require_values(const std::vector<RunOutcome>& runs, Quantity quantity, const char* what,
                    std::size_t least) {
  const std::size_t found = values_of(runs, quantity);
  if (found < least)
    fail(ExitCode::kUsage, "upmoe cost: --fit: found runs with {} different {}, expected at least {}", found,
         what, least);
}

Law sum_law(const std::vector<RunOutcome>& runs) {
  static const Term kTerms[] = {{"A", "a", [](const RunOutcome& r) { return r.size; }},
                                {"B", "b", [](const RunOutcome& r) { return r.tokens; }}};
  static constexpr const char* kWords[] = {"sizes", "numbers of tokens"};
  static constexpr const char* kSymbols[] = {"N", "D"};
  std::vector<Term> terms;
  Law law{"L = E", {"E"}, {}};
  for (std::size_t t = 0; t < std::size(kTerms); ++t) {
    if (values_of(runs, kTerms[t].quantity) == 1) continue;
    require_values(runs, kTerms[t].quantity, kWords[t], 3);
    terms.push_back(kTerms[t]);
    law.words += fmt::format(" + {} {}^-{}", kTerms[t].amplitude, kSymbols[t], kTerms[t].power);
    law.names.insert(law.names.end(), {kTerms[t].amplitude, kTerms[t].power});
  }
  if (terms.empty())
    fail(ExitCode::kUsage,
         "upmoe cost: --fit: all runs have one size and one number of tokens, so there is nothing to fit");
  law.solve = [terms](const std::vector<RunOutcome>& some) { return solve_sum(some, terms); };
  return law;
}

Law upcycling_law(const std::vector<RunOutcome>& runs) {
  if (values_of(runs, [](const RunOutcome& r) { return r.size; }) > 1)
    fail(ExitCode::kUsage,
         "upmoe cost: --fit with --source: the law is of one size, found runs of several (FLOPs per token)");
  require_values(
      runs, [](const RunOutcome& r) { return *r.source_tokens; }, "numbers of tokens of their sources", 2);
  require_values(
      runs, [](const RunOutcome& r) { return r.tokens; }, "numbers of tokens", 3);
  return {"L = E + A D1^-p D2^(-q + r ln D1)", {"E", "A", "p", "q", "r"}, solve_upcycling};
}

void add_ranges(ScalingFit& fit, const Law& law, const std::vector<RunOutcome>& runs) {
  if (runs.size() < law.names.size() + 2) return;
  for (std::size_t left_out = 0; left_out < runs.size(); ++left_out) {
    std::vector<RunOutcome> some = runs;
    some.erase(some.begin() + static_cast<std::ptrdiff_t>(left_out));
    const Solution s = law.solve(some);
    if (s.numbers.empty()) continue;
    for (std::size_t k = 0; k < fit.numbers.size(); ++k) {
      std::optional<std::pair<double, double>>& range = fit.numbers[k].range;
      if (!range) range = {s.numbers[k], s.numbers[k]};
      range->first = std::min(range->first, s.numbers[k]);
      range->second = std::max(range->second, s.numbers[k]);
    }
  }
}

std::vector<std::string> remarks_on(const ScalingFit& fit, const std::vector<RunOutcome>& runs) {
  const auto number = [&](const char* name) -> std::optional<double> {
    for (const FittedNumber& n : fit.numbers)
      if (n.name == name) return n.value;
    return std::nullopt;
  };
  std::vector<std::string> words;
  const std::optional<double> a = number("a"), b = number("b"), r = number("r");
  if (r) {
    double most = 0;
    for (const RunOutcome& run : runs) most = std::max(most, *run.source_tokens);
    words.push_back(
        fmt::format("behind {:.3g} tokens of the source, the most there are, the loss goes as D2^{:.3f}",
                    most, -*number("q") + *r * std::log(most)));
    if (*r > 0)
      words.push_back(
          fmt::format("behind {:.3g} tokens of a source, training the upcycled model would gain nothing",
                      std::exp(*number("q") / *r)));
  } else if (a && b) {
    words.push_back(fmt::format("the least loss for C FLOPs: N as C^{:.3f}, D as C^{:.3f}", *b / (*a + *b),
                                *a / (*a + *b)));
  } else {
    words.emplace_back(a ? "all runs saw the same number of tokens: E holds what that costs"
                         : "all runs have one size: E holds what that costs");
  }
  return words;
}

}  // namespace

RunOutcome outcome_of(const RunCurve& run, const RunCurve* source) {
  return {.name = run.name,
          .size = (run.spent.flops - run.teacher_flops) / run.spent.tokens / 6,
          .tokens = run.to_final_loss().tokens,
          .source_tokens = source == nullptr ? std::nullopt : std::optional(source->spent.tokens),
          .loss = run.final_loss(),
          .held_out = run.held_out};
}

ScalingFit fit_scaling(const std::vector<RunOutcome>& runs) {
  UPMOE_CHECK(!runs.empty(), "no runs");
  for (const RunOutcome& r : runs) {
    if (r.held_out != runs.front().held_out)
      fail(ExitCode::kUsage,
           "upmoe cost: --fit: {} has held-out losses and {} has not; give all runs evaluations (data.valid, "
           "train.eval_every), or none",
           (r.held_out ? r : runs.front()).name, (r.held_out ? runs.front() : r).name);
    if (!(r.size > 0 && r.tokens > 0 && r.loss > 0 && std::isfinite(r.loss) &&
          r.source_tokens.value_or(1) > 0))
      fail(ExitCode::kBadInput, "{}: FLOPs {}, tokens {}, loss {}: expected numbers above 0", r.name, r.size,
           r.tokens, r.loss);
  }
  const Law law = runs.front().source_tokens ? upcycling_law(runs) : sum_law(runs);
  if (runs.size() <= law.names.size())
    fail(ExitCode::kUsage,
         "upmoe cost: --fit: {} has {} numbers; found {} runs, expected more than numbers, or any law fits",
         law.words, law.names.size(), runs.size());
  const Solution s = law.solve(runs);
  if (s.numbers.empty())
    fail(ExitCode::kUsage,
         "upmoe cost: --fit: {} runs do not tell the numbers of {} apart: "
         "let what differs between them differ in other combinations",
         runs.size(), law.words);
  ScalingFit fit{.law = law.words,
                 .numbers = {},
                 .predicted = s.predicted,
                 .rms = std::sqrt(s.error / static_cast<double>(runs.size())),
                 .remarks = {}};
  for (std::size_t k = 0; k < law.names.size(); ++k) fit.numbers.push_back({law.names[k], s.numbers[k], {}});
  add_ranges(fit, law, runs);
  fit.remarks = remarks_on(fit, runs);
  return fit;
}

}  // namespace upmoe
