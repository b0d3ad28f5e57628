#pragma once
// The balance terms expert by expert, for every backend.

#include "kernels/ops/balance.h"

namespace upmoe {

// What one mixture's terms are made of: a row of BalanceCounts.
struct MixtureLoad {
  const double *load, *pool;
  const float* previous;  // null where no term asks
};

constexpr MixtureLoad counts_of(const double* loads, const double* pool, const float* previous,
                                std::int64_t mixture, const BalanceRule& r) {
  return {loads + mixture * r.row.size(), pool,
          previous == nullptr ? nullptr : previous + mixture * r.row.experts};
}

constexpr double sum_of(const double* x, std::int64_t n) {
  double sum = 0;
  for (std::int64_t i = 0; i < n; ++i) sum += x[i];
  return sum;
}

// The mean of E c / (all c) over the group of e.
constexpr double group_mean(const double* assigned, std::int64_t e, const BalanceRule& r) {
  const std::int64_t width = r.row.experts / r.groups;
  const double all = sum_of(assigned, r.row.experts);
  double mean = 0;
  for (std::int64_t i = e / width * width; i < (e / width + 1) * width; ++i)
    mean += static_cast<double>(r.row.experts) * assigned[i] / all / static_cast<double>(width);
  return mean;
}

// f_e of a term that is not counted by sequence.
constexpr double balance_f(const BalanceTerm& term, const MixtureLoad& c, std::int64_t e,
                           const BalanceRule& r) {
  switch (term.form) {
    case BalanceForm::kPooled:
      return c.pool[e] / static_cast<double>(r.pool_tokens);
    case BalanceForm::kFirstChoice:
      return c.load[r.row.experts + e] / static_cast<double>(r.tokens);
    case BalanceForm::kShares:
      return static_cast<double>(c.previous[e]);
    case BalanceForm::kGroups:
      return group_mean(c.load, e, r);
    case BalanceForm::kSequences:
    case BalanceForm::kWeightVariation:
    case BalanceForm::kChanceVariation:
      break;
  }
  return 0;
}

// f_e of sequence b, whose assignments are `all` together.
constexpr double sequence_f(const double* assigned_E, double all, std::int64_t e, const BalanceRule& r) {
  return static_cast<double>(r.row.experts) * assigned_E[e] / all / static_cast<double>(r.row.sequences);
}

constexpr bool is_variation(BalanceForm form) {
  return form == BalanceForm::kWeightVariation || form == BalanceForm::kChanceVariation;
}

// The E sums that a variation is of.
constexpr const double* sums_of(BalanceForm form, const MixtureLoad& c, const BalanceRule& r) {
  return c.load + (form == BalanceForm::kWeightVariation ? r.row.weights_at() : r.row.chances_at());
}

struct Variation {
  double mean = 0, variance = 0;
  constexpr double square() const { return mean * mean + 1e-10; }
};

constexpr Variation variation_of(const double* sums_E, const BalanceRule& r) {
  const auto n = static_cast<double>(r.row.experts);
  Variation v;
  for (std::int64_t e = 0; e < r.row.experts; ++e) v.mean += sums_E[e] / n;
  for (std::int64_t e = 0; e < r.row.experts; ++e)
    v.variance += (sums_E[e] - v.mean) * (sums_E[e] - v.mean) / n;
  return v;
}

// Of the sum of expert e, from the terms of one of the two forms of variation.
constexpr float variation_gradient(BalanceForm form, const MixtureLoad& c, std::int64_t e,
                                   const BalanceRule& r) {
  const double* sums_E = sums_of(form, c, r);
  const auto n = static_cast<double>(r.row.experts);
  double sum = 0;
  for (int i = 0; i < r.terms; ++i) {
    if (r.term[i].form != form) continue;
    const Variation v = variation_of(sums_E, r);
    const double square = v.square();
    sum += r.term[i].coefficient * 2 / n *
           ((sums_E[e] - v.mean) / square - v.variance * v.mean / (square * square));
  }
  return static_cast<float>(sum);
}

// Of expert e, for the tokens of sequence b, or for all (b = 0).
constexpr float balance_gradient(const MixtureLoad& c, std::int64_t b, std::int64_t e, const BalanceRule& r) {
  double sum = 0;
  for (int i = 0; i < r.terms; ++i) {
    const BalanceTerm& term = r.term[i];
    if (is_variation(term.form)) continue;
    if (term.form == BalanceForm::kSequences) {
      const double* assigned = c.load + (3 + b) * r.row.experts;
      const double tokens = static_cast<double>(r.tokens) / static_cast<double>(r.row.sequences);
      sum += term.coefficient * sequence_f(assigned, sum_of(assigned, r.row.experts), e, r) / tokens;
    } else {
      const double tokens = static_cast<double>(term.form == BalanceForm::kPooled ? r.pool_tokens : r.tokens);
      sum += term.coefficient * term.factor * balance_f(term, c, e, r) / tokens;
    }
  }
  return static_cast<float>(sum);
}

// kPooled's is the pool's, whichever mixture is asked.
constexpr double balance_value(const BalanceTerm& term, const MixtureLoad& c, const BalanceRule& r) {
  const std::int64_t E = r.row.experts;
  double value = 0;
  if (term.form == BalanceForm::kSequences) {
    const double tokens = static_cast<double>(r.tokens) / static_cast<double>(r.row.sequences);
    for (std::int64_t b = 0; b < r.row.sequences; ++b) {
      const double *assigned = c.load + (3 + b) * E, *probability = assigned + r.row.sequences * E;
      const double all = sum_of(assigned, E);
      for (std::int64_t e = 0; e < E; ++e)
        value += sequence_f(assigned, all, e, r) * (probability[e] / tokens);
    }
    return value;
  }
  if (is_variation(term.form)) {
    const Variation v = variation_of(sums_of(term.form, c, r), r);
    return v.variance / v.square();
  }
  const bool pooled = term.form == BalanceForm::kPooled;
  const double* probability = pooled ? c.pool + E : c.load + 2 * E;
  const auto tokens = static_cast<double>(pooled ? r.pool_tokens : r.tokens);
  for (std::int64_t e = 0; e < E; ++e)
    value += term.factor * balance_f(term, c, e, r) * (probability[e] / tokens);
  return value;
}

constexpr int value_count(const BalanceRule& r) {  // V
  return 2 + r.terms;
}

// What a mixture adds to place i of the values: the mean of lse^2 over its tokens, what it lost, its terms.
constexpr double mixture_value(int i, const MixtureLoad& c, const BalanceRule& r) {
  if (i == 0) return c.load[r.row.z_at()] / static_cast<double>(r.tokens);
  if (i == 1) return r.row.lost ? c.load[r.row.lost_at()] : 0.0;
  return balance_value(r.term[i - 2], c, r);
}

// What all mixtures add to place i of the values. `value_of(mixture, i)`: theirs.
template <class ValueOf>
constexpr double sum_of_mixtures(int i, std::int64_t mixtures, const MixtureLoad& pool, const BalanceRule& r,
                                 const ValueOf& value_of) {
  if (i > 1 && r.term[i - 2].form == BalanceForm::kPooled)
    return r.counts_pool ? balance_value(r.term[i - 2], pool, r) : 0.0;
  double sum = 0;
  for (std::int64_t m = 0; m < mixtures; ++m) sum += value_of(m, i);
  return sum;
}

}  // namespace upmoe
