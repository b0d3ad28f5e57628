// Every balance term against its formula over the tokens themselves, and its gradient against finite differences.

#include "trainer/model/balance.h"

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <functional>
#include <random>

#include "tests/support/balance_of.h"

namespace upmoe {
namespace {

using test::balance_of;
using test::BalanceOf;
using test::CountedMixture;
using test::OpExec;

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
    for (std::size_t e = 0; e < kExperts; ++e) previous.push_back(static_cast<float>(uniform(random)));
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
  CountedMixture counted(bool by_sequence = true) const {
    CountedMixture c{{}, previous};
    const auto add = [&](const auto& of) {
      for (std::size_t e = 0; e < kExperts; ++e) c.loads_L.push_back(of(e));
    };
    add([&](std::size_t e) { return count(e, 0, kTokens); });
    add([&](std::size_t e) { return count(e, 0, kTokens, 1); });
    add([&](std::size_t e) { return mean(e, 0, kTokens) * kTokens; });
    for (std::size_t b = 0; by_sequence && b < kSequences; ++b)
      add([&](std::size_t e) { return count(e, b * kSeqLen, (b + 1) * kSeqLen); });
    for (std::size_t b = 0; by_sequence && b < kSequences; ++b)
      add([&](std::size_t e) { return mean(e, b * kSeqLen, (b + 1) * kSeqLen) * kSeqLen; });
    c.loads_L.push_back(kTokens * 2.5);  // z
    return c;
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

BalanceOf terms_of(const BalanceConfig& config, const Model& model, bool by_sequence = true) {
  std::vector<CountedMixture> counted;
  for (const Layer& l : model) counted.push_back(l.counted(by_sequence));
  return balance_of(config,
                    {kTokens,
                     static_cast<std::int64_t>(model.size()),
                     {kExperts, by_sequence ? std::int64_t{kSequences} : 0}},
                    counted);
}

class Term : public testing::TestWithParam<AuxKind> {};

TEST_P(Term, ValueAndGradient) {
  Model model{Layer(1), Layer(2)};
  BalanceConfig config;
  config.terms = {{GetParam(), 0.7}};
  config.groups = 3;
  const BalanceOf terms = terms_of(config, model);
  EXPECT_NEAR(terms.aux.at(0), naive(GetParam(), model, 3), 1e-12);
  EXPECT_NEAR(terms.z, 5.0, 1e-12) << "2.5 of each layer's tokens";
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
      EXPECT_NEAR(terms.gradient[m].at(sequence * kExperts + i % kExperts), 0.7 * (up - down) / (2 * step),
                  1e-6)
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
  BalanceConfig one, other, both;
  one.terms = {{AuxKind::kSwitch, 0.3}};
  other.terms = {{AuxKind::kHf, 2}};
  both.terms = {one.terms[0], other.terms[0]};
  const auto of = [&](const BalanceConfig& config) { return terms_of(config, model, false); };
  const BalanceOf sum = of(both);
  EXPECT_EQ(sum.aux, (Values{of(one).aux[0], of(other).aux[0]}));
  ASSERT_EQ(sum.gradient[0].size(), kExperts);
  for (std::size_t e = 0; e < kExperts; ++e)
    EXPECT_NEAR(sum.gradient[0][e], of(one).gradient[0][e] + of(other).gradient[0][e], 1e-7);
}

// CV^2 of the sums of weights and of chances, as the contract has it, and its derivative; each has its own gradient.
// What lies behind z is found whatever else is counted.
TEST(Terms, VariationOfSums) {
  const auto naive_variation = [](const Values& sums) {
    double mean = 0, variance = 0;
    for (const double s : sums) mean += s;
    mean /= static_cast<double>(sums.size());
    for (const double s : sums) variance += (s - mean) * (s - mean);
    return variance / static_cast<double>(sums.size()) / (mean * mean + 1e-10);
  };
  const Model model{Layer(4), Layer(5)};
  std::array<Values, 2> weight, chance;
  std::vector<CountedMixture> counted;
  for (const bool lost : {false, true}) {
    counted.clear();
    for (std::size_t m = 0; m < model.size(); ++m) {
      weight[m].clear();
      chance[m].clear();
      for (std::size_t e = 0; e < kExperts; ++e) {
        weight[m].push_back(0.4 + 0.7 * static_cast<double>((e + m) * e % 5));
        chance[m].push_back(1.3 + 0.2 * static_cast<double>((e * 3 + m) % 7));
      }
      counted.push_back(model[m].counted(lost));
      Values& row = counted.back().loads_L;
      if (lost) row.push_back(static_cast<double>(3 + m));
      row.insert(row.end(), weight[m].begin(), weight[m].end());
      row.insert(row.end(), chance[m].begin(), chance[m].end());
    }
    BalanceConfig config;
    config.terms = {{AuxKind::kImportance, 0.7}, {AuxKind::kLoad, 0.2}};
    const LoadRow row{kExperts, lost ? std::int64_t{kSequences} : 0, lost, true, true};
    const BalanceOf terms = balance_of(config, {kTokens, 2, row}, counted);
    EXPECT_EQ(terms.lost, lost ? 7 : 0);
    EXPECT_NEAR(terms.z, 5.0, 1e-12);
    EXPECT_NEAR(terms.aux[0], naive_variation(weight[0]) + naive_variation(weight[1]), 1e-12);
    EXPECT_NEAR(terms.aux[1], naive_variation(chance[0]) + naive_variation(chance[1]), 1e-12);
    for (std::size_t m = 0; m < model.size(); ++m) {
      for (const float g : terms.gradient[m]) EXPECT_EQ(g, 0) << "not of the probabilities";
      for (std::size_t e = 0; e < kExperts; ++e) {
        const auto slope = [&](Values sums) {
          sums[e] += 1e-4;
          const double up = naive_variation(sums);
          sums[e] -= 2e-4;
          return (up - naive_variation(sums)) / 2e-4;
        };
        EXPECT_NEAR(terms.weight_gradient[m][e], 0.7 * slope(weight[m]), 1e-6);
        EXPECT_NEAR(terms.chance_gradient[m][e], 0.2 * slope(chance[m]), 1e-6);
      }
    }
  }
}

// Sums that are counted for one term alone, and beside terms of the probabilities, which they leave as they are.
TEST(Terms, VariationBesideOthers) {
  const Model model{Layer(6)};
  BalanceConfig plain, both;
  plain.terms = {{AuxKind::kSwitch, 0.3}};
  both.terms = {{AuxKind::kLoad, 0.5}, plain.terms[0]};
  CountedMixture counted = model[0].counted(false);
  const BalanceOf alone = balance_of(plain, {kTokens, 1, {kExperts}}, {counted});
  for (std::size_t e = 0; e < kExperts; ++e) counted.loads_L.push_back(e == 2 ? 4.0 : 1.0);
  const LoadRow row{.experts = kExperts, .chances = true};
  const BalanceOf terms = balance_of(both, {kTokens, 1, row}, {counted});
  EXPECT_EQ(terms.aux[1], alone.aux[0]);
  EXPECT_EQ(terms.gradient, alone.gradient);
  EXPECT_NEAR(terms.aux[0], 1.25 / (1.5 * 1.5), 1e-9);
  EXPECT_GT(terms.chance_gradient[0][2], 0);
  EXPECT_LT(terms.chance_gradient[0][3], 0);
  EXPECT_TRUE(terms.weight_gradient.empty());
}

// Where every expert gets the same, each term is what its contract says.
TEST(Terms, BalancedValues) {
  // Four experts, two sequences of six tokens with two choices each.
  CountedMixture balanced;
  for (const auto& [value, times] :
       {std::pair{6.0, 4}, {3.0, 4}, {3.0, 4}, {3.0, 8}, {1.5, 8}, {0.0, 1}, {2.5, 4}, {6.0, 4}})
    balanced.loads_L.insert(balanced.loads_L.end(), static_cast<std::size_t>(times), value);
  balanced.previous_E.assign(4, 0.25);
  BalanceConfig config;
  config.groups = 2;
  for (const auto& [kind, name] : kNames<AuxKind>.built) {
    config.terms = {{kind, 1}};
    const bool variation = kind == AuxKind::kImportance || kind == AuxKind::kLoad;
    const double expected = variation                  ? 0
                            : kind == AuxKind::kHf     ? 2
                            : kind == AuxKind::kGShard ? 1.0 / 16
                                                       : 1;
    const LoadRow row{.experts = 4, .sequences = 2, .weights = true, .chances = true};
    EXPECT_NEAR(balance_of(config, {12, 1, row}, {balanced}).aux[0], expected, 1e-12) << name;
  }
}

// A pipeline's stages hand the pool on; what a step counts is added to what it counted before.
TEST(Loads, ArePooledAndCounted) {
  OpExec ex;
  constexpr std::int64_t M = 3, E = kExperts, L = 3 * E + 1;
  const test::HostTensor loads = test::random_tensor({M, L}, DType::kF64, 1);
  test::HostTensor pool = test::filled({2 * E}, DType::kF64, 99),
                   assigned = test::filled({M, E}, DType::kF64, 1),
                   more = test::filled({M, E}, DType::kF64, 2);
  ops::pool_loads(ex, pool, assigned, loads, Accumulate::kOverwrite);
  ops::pool_loads(ex, pool, {}, loads, Accumulate::kAdd);
  ops::add_sums(ex, more.view().reshape({M * E}), assigned.view().reshape({M * E}));
  test::finish_ops();
  for (std::size_t e = 0; e < kExperts; ++e) {
    double counts = 0, probabilities = 0;
    for (std::size_t m = 0; m < M; ++m) {
      counts += 2 * loads.get(m * L + e);
      probabilities += 2 * loads.get(m * L + 2 * E + e);
      EXPECT_NEAR(assigned.get(m * E + e), 1 + loads.get(m * L + e), 1e-13);
      EXPECT_NEAR(more.get(m * E + e), 3 + loads.get(m * L + e), 1e-13);
    }
    EXPECT_NEAR(pool.get(e), counts, 1e-13);
    EXPECT_NEAR(pool.get(E + e), probabilities, 1e-13);
  }
  // The last stage of a model may have no mixture, and counts the pool's value all the same.
  BalanceConfig config;
  config.terms = {{AuxKind::kHf, 1}, {AuxKind::kSequence, 1}};
  test::HostTensor values = test::filled({4}, DType::kF64, 4);
  test::HostTensor none({0, E}, DType::kF32);
  ops::balance_gradients(ex, {none}, values, {test::HostTensor({0, L}, DType::kF64), pool},
                         rule_of(config, {kTokens, 2, {E}}, true));
  test::finish_ops();
  double expected = 4;
  for (std::size_t e = 0; e < kExperts; ++e)
    expected += kExperts * (pool.get(e) / (2 * kTokens)) * (pool.get(kExperts + e) / (2 * kTokens));
  EXPECT_NEAR(values.get(2), expected, 1e-12);
  for (const std::int64_t other : {0, 1, 3}) EXPECT_EQ(values.get(other), 4) << other;
}

}  // namespace
}  // namespace upmoe
