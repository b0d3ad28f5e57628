// Every balance term against its formula over the tokens themselves, and its gradient against finite differences.

#include "trainer/model/balance.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <random>

namespace upmoe {
namespace {

using Values = std::vector<double>;

constexpr std::size_t kExperts = 6, kSequences = 3, kSeqLen = 5, kTopK = 2, kTokens = kSequences * kSeqLen;

// One layer's probabilities and choices, token by token.
struct Layer {
  Values probability;               // [T, E]
  std::vector<std::size_t> chosen;  // [T, K]
  Values previous;

  explicit Layer(unsigned seed) {
    std::mt19937 random(seed);
    std::uniform_real_distribution<double> uniform(0.1, 1);
    for (std::size_t i = 0; i < kTokens * kExperts; ++i) probability.push_back(uniform(random));
    for (std::size_t t = 0; t < kTokens; ++t)
      for (std::size_t k = 0; k < kTopK; ++k)
        chosen.push_back((random() % 3 + 2 * k * (t % 2) + k) % kExperts);
    for (std::size_t e = 0; e < kExperts; ++e) previous.push_back(uniform(random));
  }
  double count(std::size_t e, std::size_t begin, std::size_t end, std::size_t choices = kTopK) const {
    double n = 0;
    for (std::size_t t = begin; t < end; ++t)
      for (std::size_t k = 0; k < choices; ++k) n += chosen[t * kTopK + k] == e;
    return n;
  }
  double mean(std::size_t e, std::size_t begin, std::size_t end) const {
    double sum = 0;
    for (std::size_t t = begin; t < end; ++t) sum += probability[t * kExperts + e];
    return sum / static_cast<double>(end - begin);
  }
  LayerLoad load() const {
    LayerLoad l;
    l.tokens = kTokens;
    l.previous = previous;
    for (std::size_t e = 0; e < kExperts; ++e) {
      l.assigned.push_back(count(e, 0, kTokens));
      l.first_choice.push_back(count(e, 0, kTokens, 1));
      l.probability.push_back(mean(e, 0, kTokens) * kTokens);
    }
    for (std::size_t b = 0; b < kSequences; ++b)
      for (std::size_t e = 0; e < kExperts; ++e) {
        l.assigned_BE.push_back(count(e, b * kSeqLen, (b + 1) * kSeqLen));
        l.probability_BE.push_back(mean(e, b * kSeqLen, (b + 1) * kSeqLen) * kSeqLen);
      }
    return l;
  }
};

using Model = std::vector<Layer>;

double per_expert(const Layer& l, const std::function<double(std::size_t)>& f) {
  double sum = 0;
  for (std::size_t e = 0; e < kExperts; ++e) sum += f(e) * l.mean(e, 0, kTokens);
  return sum;
}

double naive(AuxKind kind, const Model& model, std::size_t groups) {
  const double E = kExperts, N = kTokens, M = static_cast<double>(model.size());
  double sum = 0;
  if (kind == AuxKind::kHf) {
    for (std::size_t e = 0; e < kExperts; ++e) {
      double assigned = 0, probability = 0;
      for (const Layer& l : model) {
        assigned += l.count(e, 0, kTokens);
        probability += l.mean(e, 0, kTokens);
      }
      sum += E * (assigned / (N * M)) * (probability / M);
    }
    return sum;
  }
  for (const Layer& l : model) {
    if (kind == AuxKind::kSwitch)
      sum += per_expert(l, [&](std::size_t e) { return E * l.count(e, 0, kTokens, 1) / N; });
    if (kind == AuxKind::kGShard)
      sum += per_expert(l, [&](std::size_t e) { return l.count(e, 0, kTokens, 1) / N / E; });
    if (kind == AuxKind::kGlobal) sum += per_expert(l, [&](std::size_t e) { return E * l.previous[e]; });
    if (kind == AuxKind::kSequence)
      for (std::size_t b = 0; b < kSequences; ++b)
        for (std::size_t e = 0; e < kExperts; ++e)
          sum += l.count(e, b * kSeqLen, (b + 1) * kSeqLen) * E / (kSeqLen * kTopK) *
                 l.mean(e, b * kSeqLen, (b + 1) * kSeqLen) / kSequences;
    for (std::size_t g = 0; kind == AuxKind::kGroup && g < groups; ++g) {
      const std::size_t width = kExperts / groups;
      double f = 0, p = 0;
      for (std::size_t e = g * width; e < (g + 1) * width; ++e) {
        f += E / (kTopK * N) * l.count(e, 0, kTokens) / static_cast<double>(width);
        p += l.mean(e, 0, kTokens);
      }
      sum += f * p;
    }
  }
  return sum;
}

BalanceTerms terms_of(const BalanceConfig& config, const Model& model) {
  std::vector<LayerLoad> loads;
  LoadPool pool;
  for (const Layer& l : model) {
    loads.push_back(l.load());
    pool.add(loads.back());
  }
  return balance_terms(config, loads, pool, true);
}

class Term : public testing::TestWithParam<AuxKind> {};

TEST_P(Term, ValueAndGradient) {
  Model model{Layer(1), Layer(2)};
  BalanceConfig config;
  config.terms = {{GetParam(), 0.7}};
  config.groups = 3;
  const BalanceTerms terms = terms_of(config, model);
  EXPECT_NEAR(terms.aux.at(0), naive(GetParam(), model, 3), 1e-12);
  for (std::size_t m = 0; m < model.size(); ++m)
    for (std::size_t i = 0; i < kTokens * kExperts; ++i) {
      double& p = model[m].probability[i];
      const double before = p, step = 1e-3;
      p = before + step;
      const double up = naive(GetParam(), model, 3);
      p = before - step;
      const double down = naive(GetParam(), model, 3);
      p = before;
      const std::size_t sequence = i / kExperts / kSeqLen;
      EXPECT_NEAR(terms.aux_gradient[m].at(sequence * kExperts + i % kExperts),
                  0.7 * (up - down) / (2 * step), 1e-6)
          << "layer " << m << " token " << i / kExperts << " expert " << i % kExperts;
    }
}

INSTANTIATE_TEST_SUITE_P(Kinds, Term, testing::ValuesIn([] {
                           std::vector<AuxKind> all;
                           for (const auto& [kind, name] : kNames<AuxKind>.built)
                             if (kind != AuxKind::kImportance && kind != AuxKind::kLoad) all.push_back(kind);
                           return all;
                         }()),
                         [](const auto& i) { return std::string(name_of(i.param)); });

// Each with its own coefficient; without counts by sequence one row of gradients serves all tokens.
TEST(Terms, AddUp) {
  const Model model{Layer(3)};
  const LayerLoad load = [&] {
    LayerLoad l = model[0].load();
    l.assigned_BE.clear();
    l.probability_BE.clear();
    return l;
  }();
  LoadPool pool;
  pool.add(load);
  BalanceConfig one, other, both;
  one.terms = {{AuxKind::kSwitch, 0.3}};
  other.terms = {{AuxKind::kHf, 2}};
  both.terms = {one.terms[0], other.terms[0]};
  const auto of = [&](const BalanceConfig& config) { return balance_terms(config, {&load, 1}, pool, true); };
  const BalanceTerms sum = of(both);
  EXPECT_EQ(sum.aux, (Values{of(one).aux[0], of(other).aux[0]}));
  ASSERT_EQ(sum.aux_gradient[0].size(), kExperts);
  for (std::size_t e = 0; e < kExperts; ++e)
    EXPECT_NEAR(sum.aux_gradient[0][e], of(one).aux_gradient[0][e] + of(other).aux_gradient[0][e], 1e-7);
}

// CV^2 of the sums of weights and of chances, as the contract has it, and its derivative; each has its own gradient.
TEST(Terms, VariationOfSums) {
  const auto naive_variation = [](const Values& sums) {
    double mean = 0, variance = 0;
    for (const double s : sums) mean += s;
    mean /= static_cast<double>(sums.size());
    for (const double s : sums) variance += (s - mean) * (s - mean);
    return variance / static_cast<double>(sums.size()) / (mean * mean + 1e-10);
  };
  Model model{Layer(4)};
  LayerLoad l = model[0].load();
  for (std::size_t e = 0; e < kExperts; ++e) {
    l.weight.push_back(0.4 + 0.7 * static_cast<double>(e * e % 5));
    l.chance.push_back(1.3 + 0.2 * static_cast<double>(e * 3 % 7));
  }
  LoadPool pool;
  pool.add(l);
  BalanceConfig config;
  config.terms = {{AuxKind::kImportance, 0.7}, {AuxKind::kLoad, 0.2}};
  const BalanceTerms terms = balance_terms(config, {&l, 1}, pool, true);
  EXPECT_NEAR(terms.aux[0], naive_variation(l.weight), 1e-12);
  EXPECT_NEAR(terms.aux[1], naive_variation(l.chance), 1e-12);
  for (std::size_t e = 0; e < kExperts; ++e) {
    const auto slope = [&](Values sums) {
      sums[e] += 1e-4;
      const double up = naive_variation(sums);
      sums[e] -= 2e-4;
      return (up - naive_variation(sums)) / 2e-4;
    };
    EXPECT_NEAR(terms.weight_gradient[0][e], 0.7 * slope(l.weight), 1e-6);
    EXPECT_NEAR(terms.chance_gradient[0][e], 0.2 * slope(l.chance), 1e-6);
    EXPECT_EQ(terms.aux_gradient[0][e], 0) << "not of the probabilities";
  }
}

// Where every expert gets the same, each term is what its contract says.
TEST(Terms, BalancedValues) {
  LayerLoad l;
  l.tokens = 12;
  l.assigned.assign(4, 6.0);
  l.first_choice.assign(4, 3.0);
  l.probability.assign(4, 3.0);
  l.previous.assign(4, 0.25);
  l.assigned_BE.assign(8, 3.0);
  l.probability_BE.assign(8, 1.5);
  l.weight.assign(4, 2.5);
  l.chance.assign(4, 6.0);
  LoadPool pool;
  pool.add(l);
  BalanceConfig config;
  config.groups = 2;
  for (const auto& [kind, name] : kNames<AuxKind>.built) {
    config.terms = {{kind, 1}};
    const bool variation = kind == AuxKind::kImportance || kind == AuxKind::kLoad;
    const double expected = variation                  ? 0
                            : kind == AuxKind::kHf     ? 2
                            : kind == AuxKind::kGShard ? 1.0 / 16
                                                       : 1;
    EXPECT_NEAR(balance_terms(config, {&l, 1}, pool, true).aux[0], expected, 1e-12) << name;
  }
}

}  // namespace
}  // namespace upmoe
