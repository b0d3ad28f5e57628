#include "trainer/model/balance.h"

#include <algorithm>
#include <numeric>

#include "kernels/ops/noisy_routing.h"

namespace upmoe {

bool BalanceConfig::has(AuxKind kind) const {
  return std::any_of(terms.begin(), terms.end(), [&](const AuxTerm& t) { return t.kind == kind; });
}

void RouterLoad::count(Exec& ex, const Routes& routes) const {
  const auto& [probs_TE, index_TK, weight_TK, lse_T] = routes;
  ops::balance_stats(ex, stats_3E(), z_1(), probs_TE, index_TK, lse_T);
  if (sequences > 0) ops::row_balance_stats(ex, stats_2BE(), probs_TE, index_TK, sequence_t);
  if (weight_E.given()) ops::sum_by_expert(ex, weight_E, weight_TK, index_TK);
}

ConstTensorView RouterBalance::with_weight_gradient(Exec& ex, ConstTensorView dweight_TK,
                                                    ConstTensorView index_TK) const {
  if (!weight_gradient_E.given()) return dweight_TK;
  const TensorView sum_TK =
      ex.scratch->take(dweight_TK.shape, DType::kF32, "router weights' gradient with importance");
  ops::add_by_expert(ex, sum_TK, dweight_TK, weight_gradient_E, index_TK);
  return sum_TK;
}

LayerLoad LayerLoad::unpack(std::int64_t tokens, std::int64_t sequences, std::span<const double> sums_L) {
  const auto B = static_cast<std::size_t>(sequences), E = sums_L.size() / (3 + 2 * B);
  const auto part = [&](std::size_t begin, std::size_t rows) {
    const auto values = sums_L.subspan(begin * E, rows * E);
    return std::vector<double>(values.begin(), values.end());
  };
  return {tokens, part(0, 1), part(1, 1), part(2, 1), part(3, B), part(3 + B, B), sums_L.back()};
}

// tokens, then the experts' assignments, then their probabilities: zeros before the first layer.
std::vector<double> LoadPool::pack(std::size_t experts) const {
  std::vector<double> packed(packed_size(experts));
  packed[0] = tokens;
  std::copy(assigned.begin(), assigned.end(), packed.begin() + 1);
  std::copy(probability.begin(), probability.end(), packed.end() - static_cast<std::ptrdiff_t>(experts));
  return packed;
}

LoadPool LoadPool::unpack(std::span<const double> packed) {
  LoadPool pool;
  if (packed.empty() || packed[0] == 0) return pool;
  const std::size_t E = packed.size() / 2;
  pool.tokens = packed[0];
  pool.assigned.assign(packed.begin() + 1, packed.end() - static_cast<std::ptrdiff_t>(E));
  pool.probability.assign(packed.end() - static_cast<std::ptrdiff_t>(E), packed.end());
  return pool;
}

void LoadPool::add(const LayerLoad& load) {
  add(LoadPool{static_cast<double>(load.tokens), load.assigned, load.probability});
}

void LoadPool::add(const LoadPool& other) {
  tokens += other.tokens;
  assigned.resize(std::max(assigned.size(), other.assigned.size()));
  probability.resize(assigned.size());
  for (std::size_t e = 0; e < other.assigned.size(); ++e) {
    assigned[e] += other.assigned[e];
    probability[e] += other.probability[e];
  }
}

namespace {

// One layer's gradients, of the tokens of each row: one row, or one for each sequence.
struct Rows {
  std::size_t experts, rows;
  std::vector<double> gradient, weight, chance;  // of the last two E: of the sums
  Rows(std::size_t experts_, std::size_t rows_)
      : experts(experts_), rows(rows_), gradient(experts_ * rows_), weight(experts_), chance(experts_) {}
  void add(std::size_t e, double g) {
    for (std::size_t b = 0; b < rows; ++b) gradient[b * experts + e] += g;
  }
};

// factor * sum_e f_e P_e, with what does not change with the probabilities.
struct Linear {
  double factor = 0;
  std::vector<double> f;
};

// The derivative by any one token's probability of e is factor f_e / tokens.
double add_linear(const LayerLoad& l, const Linear& term, double coefficient, Rows& rows) {
  const auto tokens = static_cast<double>(l.tokens);
  double value = 0;
  for (std::size_t e = 0; e < term.f.size(); ++e) {
    value += term.factor * term.f[e] * (l.probability[e] / tokens);
    rows.add(e, coefficient * term.factor * term.f[e] / tokens);
  }
  return value;
}

double add_sequences(const LayerLoad& l, double coefficient, Rows& rows) {
  const std::size_t E = rows.experts, B = rows.rows;
  double value = 0;
  for (std::size_t b = 0; b < B; ++b) {
    double assignments = 0;
    for (std::size_t e = 0; e < E; ++e) assignments += l.assigned_BE[b * E + e];
    const double tokens = static_cast<double>(l.tokens) / static_cast<double>(B);
    for (std::size_t e = 0; e < E; ++e) {
      const double f =
          static_cast<double>(E) * l.assigned_BE[b * E + e] / assignments / static_cast<double>(B);
      value += f * (l.probability_BE[b * E + e] / tokens);
      rows.gradient[b * E + e] += coefficient * f / tokens;
    }
  }
  return value;
}

// CV^2 of the sums; coefficient times its derivative is added to the gradient.
double add_variation(const std::vector<double>& sums, double coefficient, std::vector<double>& gradient) {
  const auto n = static_cast<double>(sums.size());
  double mean = 0, variance = 0;
  for (const double s : sums) mean += s / n;
  for (const double s : sums) variance += (s - mean) * (s - mean) / n;
  const double square = mean * mean + 1e-10;
  for (std::size_t e = 0; e < sums.size(); ++e)
    gradient[e] += coefficient * 2 / n * ((sums[e] - mean) / square - variance * mean / (square * square));
  return variance / square;
}

std::vector<double> shares(const std::vector<double>& counts, double of) {
  std::vector<double> share;
  for (const double count : counts) share.push_back(count / of);
  return share;
}

// Of each expert: the mean of E c / (k N) over its group.
std::vector<double> group_means(const LayerLoad& l, int groups) {
  const std::size_t E = l.assigned.size(), width = E / static_cast<std::size_t>(groups);
  const double assignments = std::accumulate(l.assigned.begin(), l.assigned.end(), 0.0);
  std::vector<double> mean(E);
  for (std::size_t e = 0; e < E; ++e)
    for (std::size_t i = e / width * width; i < (e / width + 1) * width; ++i)
      mean[e] += static_cast<double>(E) * l.assigned[i] / assignments / static_cast<double>(width);
  return mean;
}

Linear linear_term(const BalanceConfig& config, AuxKind kind, const LayerLoad& l) {
  const auto E = static_cast<double>(l.assigned.size()), tokens = static_cast<double>(l.tokens);
  switch (kind) {
    case AuxKind::kSwitch:
      return {E, shares(l.first_choice, tokens)};
    case AuxKind::kGShard:
      return {1 / E, shares(l.first_choice, tokens)};
    case AuxKind::kGlobal:
      return {E, l.previous};
    case AuxKind::kGroup:
      return {1, group_means(l, config.groups)};
    case AuxKind::kHf:
    case AuxKind::kSequence:
    case AuxKind::kImportance:
    case AuxKind::kLoad:
      break;
  }
  fail(ExitCode::kFailure, "the balance term {} is not of one layer's sums", name_of(kind));
}

double add_term(const BalanceConfig& config, const AuxTerm& term, const LayerLoad& l, Rows& rows) {
  if (term.kind == AuxKind::kSequence) return add_sequences(l, term.coefficient, rows);
  if (term.kind == AuxKind::kImportance) return add_variation(l.weight, term.coefficient, rows.weight);
  if (term.kind == AuxKind::kLoad) return add_variation(l.chance, term.coefficient, rows.chance);
  return add_linear(l, linear_term(config, term.kind, l), term.coefficient, rows);
}

// Of the pool, not of the layer: one value, and the same gradient for all of them.
double pooled_value(const LoadPool& all) {
  double value = 0;
  for (std::size_t e = 0; e < all.assigned.size(); ++e) {
    const double f = all.assigned[e] / all.tokens;
    value += static_cast<double>(all.assigned.size()) * f * (all.probability[e] / all.tokens);
  }
  return value;
}

void add_pooled(const LoadPool& all, double coefficient, Rows& rows) {
  for (std::size_t e = 0; e < all.assigned.size(); ++e) {
    const double f = all.assigned[e] / all.tokens;
    rows.add(e, coefficient * static_cast<double>(all.assigned.size()) * f / all.tokens);
  }
}

}  // namespace

BalanceTerms balance_terms(const BalanceConfig& config, std::span<const LayerLoad> layers,
                           const LoadPool& all, bool count_pool) {
  BalanceTerms terms;
  terms.aux.assign(config.terms.size(), 0.0);
  if (all.tokens == 0) {  // no mixtures, or a rank without a micro-batch in this round: no tokens, no term
    for (const LayerLoad& l : layers) terms.aux_gradient.emplace_back(l.assigned.size(), 0.0f);
    terms.z_scale.assign(layers.size(), 0.0f);
    return terms;
  }
  for (const LayerLoad& l : layers) {
    Rows rows(l.assigned.size(), std::max<std::size_t>(1, l.assigned_BE.size() / l.assigned.size()));
    for (std::size_t i = 0; i < config.terms.size(); ++i) {
      const AuxTerm& term = config.terms[i];
      if (term.kind == AuxKind::kHf) {
        add_pooled(all, term.coefficient, rows);
      } else if (term.coefficient != 0) {
        terms.aux[i] += add_term(config, term, l, rows);
      }
    }
    terms.aux_gradient.emplace_back(rows.gradient.begin(), rows.gradient.end());
    terms.weight_gradient.emplace_back(rows.weight.begin(), rows.weight.end());
    terms.chance_gradient.emplace_back(rows.chance.begin(), rows.chance.end());
    terms.z += l.z_sum / static_cast<double>(l.tokens);
    terms.z_scale.push_back(static_cast<float>(config.z_coefficient / static_cast<double>(l.tokens)));
  }
  for (std::size_t i = 0; i < config.terms.size() && count_pool; ++i)
    if (config.terms[i].kind == AuxKind::kHf) terms.aux[i] = pooled_value(all);
  return terms;
}

}  // namespace upmoe
