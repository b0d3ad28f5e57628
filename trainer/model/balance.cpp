#include "trainer/model/balance.h"

#include <algorithm>

namespace upmoe {

LayerLoad LayerLoad::unpack(std::int64_t tokens, std::span<const double> sums_L) {
  const std::size_t E = sums_L.size() / 3;
  const auto part = [&](std::size_t i) {
    const auto values = sums_L.subspan(i * E, E);
    return std::vector<double>(values.begin(), values.end());
  };
  return {tokens, part(0), part(1), part(2), sums_L.back()};
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

void add_pooled(const BalanceConfig& config, std::size_t layers, const LoadPool& all, bool count,
                BalanceTerms& terms) {
  const std::size_t E = all.assigned.size();
  const double n = static_cast<double>(E);
  std::vector<float> gradient(E);
  for (std::size_t e = 0; e < E; ++e) {
    const double f = all.assigned[e] / all.tokens;
    if (count) terms.aux += n * f * (all.probability[e] / all.tokens);
    // The derivative by the probability of expert e at any one token, f being a constant: the same for all tokens, so
    // one number per expert does.
    gradient[e] = static_cast<float>(config.aux_coefficient * n * f / all.tokens);
  }
  terms.aux_gradient.assign(layers, gradient);
}

void add_per_layer(const BalanceConfig& config, std::span<const LayerLoad> layers, BalanceTerms& terms) {
  for (const LayerLoad& l : layers) {
    const double n = static_cast<double>(l.assigned.size()), tokens = static_cast<double>(l.tokens);
    std::vector<float> gradient(l.assigned.size());
    for (std::size_t e = 0; e < gradient.size(); ++e) {
      const double f = l.first_choice[e] / tokens;
      terms.aux += n * f * (l.probability[e] / tokens);
      gradient[e] = static_cast<float>(config.aux_coefficient * n * f / tokens);
    }
    terms.aux_gradient.push_back(std::move(gradient));
  }
}

}  // namespace

BalanceTerms balance_terms(const BalanceConfig& config, std::span<const LayerLoad> layers,
                           const LoadPool& all, bool count_pool) {
  BalanceTerms terms;
  if (all.tokens == 0) {  // no mixtures, or a rank without a micro-batch in this round: no tokens, no term
    for (const LayerLoad& l : layers) terms.aux_gradient.emplace_back(l.assigned.size(), 0.0f);
    terms.z_scale.assign(layers.size(), 0.0f);
    return terms;
  }
  switch (config.kind) {
    case AuxKind::kHf:
      add_pooled(config, layers.size(), all, count_pool, terms);
      break;
    case AuxKind::kSwitch:
      add_per_layer(config, layers, terms);
      break;
  }
  for (const LayerLoad& l : layers) {
    terms.z += l.z_sum / static_cast<double>(l.tokens);
    terms.z_scale.push_back(static_cast<float>(config.z_coefficient / static_cast<double>(l.tokens)));
  }
  return terms;
}

}  // namespace upmoe
