// Where experts' neurons come from: counts, straddling, exact redraws; and the scale factors of the algebra.

#include "upcycle/unit_map.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>

#include "upcycle/scale.h"

namespace upmoe {
namespace {

constexpr int kExperts = 60;
constexpr std::int64_t kDense = 5504, kWidth = 1408;

UnitMap shuffled(int expert, std::int64_t redrawn = 0) {
  UnitMap map;
  map.rule = UnitMap::Rule::kShuffle;
  map.source_width = kDense;
  map.width = kWidth;
  map.begin = expert * kWidth;
  map.redrawn = redrawn;
  map.layer = 3;
  map.name = "layers.3.experts." + std::to_string(expert);
  return map;
}

std::vector<std::int64_t> copies_of(int experts) {
  const PermutationCache permutations(1, kDense);
  std::vector<std::int64_t> copies(kDense, 0);
  for (int e = 0; e < experts; ++e) {
    for (std::int64_t j = 0; j < kWidth; ++j)
      ++copies[static_cast<std::size_t>(shuffled(e).source_of(j, permutations))];
  }
  return copies;
}

TEST(UnitMap, PermutationHoldsEveryNeuronOnce) {
  for (const int n : {1, 2, 3, 5504}) {
    std::vector<std::int32_t> p = make_permutation(1, 0, 0, n);
    std::sort(p.begin(), p.end());
    for (int i = 0; i < n; ++i) ASSERT_EQ(p[static_cast<std::size_t>(i)], i);
  }
}

TEST(UnitMap,
     PermutationsAreEvenlySpread) {  // where neuron 0 of 8 goes, over many rounds: chi-squared, 7 degrees
  std::vector<double> counts(8, 0);
  for (int round = 0; round < 8000; ++round) {
    const auto p = make_permutation(1, 0, round, 8);
    ++counts[static_cast<std::size_t>(std::find(p.begin(), p.end(), 0) - p.begin())];
  }
  double chi = 0;
  for (const double c : counts) chi += (c - 1000) * (c - 1000) / 1000;
  EXPECT_LT(chi, 24.3);  // exceeded once in a thousand
}

TEST(UnitMap, ShuffleUsesEveryNeuronFifteenOrSixteenTimes) {
  const auto copies = copies_of(60);
  const auto [min, max] = std::minmax_element(copies.begin(), copies.end());
  EXPECT_EQ(*min, 15);
  EXPECT_EQ(*max, 16);
  EXPECT_EQ(std::accumulate(copies.begin(), copies.end(), std::int64_t{0}), 84'480);
}

TEST(UnitMap, ShuffleWithTheSharedExpertInThePoolUsesSixteenOrSeventeen) {
  const auto copies = copies_of(64);
  const auto [min, max] = std::minmax_element(copies.begin(), copies.end());
  EXPECT_EQ(*min, 16);
  EXPECT_EQ(*max, 17);
}

TEST(UnitMap, ExpertsStraddleCopies) {
  const PermutationCache permutations(1, kDense);
  // Expert 3 begins at 4224 and ends at 5632, 128 neurons into the second copy.
  const UnitMap map = shuffled(3);
  const auto &first = permutations.get(3, 0), &second = permutations.get(3, 1);
  for (std::int64_t j = 0; j < 1280; ++j)
    ASSERT_EQ(map.source_of(j, permutations), first[static_cast<std::size_t>(4224 + j)]);
  for (std::int64_t j = 1280; j < kWidth; ++j) {
    ASSERT_EQ(map.source_of(j, permutations), second[static_cast<std::size_t>(j - 1280)]);
  }
}

TEST(UnitMap, EveryCopyLayerAndSeedHasAPermutationOfItsOwn) {
  std::set<std::vector<std::int32_t>> all;
  for (const int layer : {0, 1}) {
    for (std::int64_t round = 0; round < 16; ++round) {
      for (const std::uint64_t seed : {1u, 2u}) all.insert(make_permutation(seed, layer, round, 64));
    }
  }
  EXPECT_EQ(all.size(), 2u * 16 * 2);
}

TEST(UnitMap, RedrawIsExactAndKeepsTheRest) {
  const PermutationCache permutations(1, kDense);
  for (const int expert : {0, 3, 59}) {
    const auto kept = shuffled(expert).units_of(FfnMatrix::kGate, 1, permutations);
    const auto units = shuffled(expert, 704).units_of(FfnMatrix::kGate, 1, permutations);
    EXPECT_EQ(std::count(units.begin(), units.end(), kNewUnit), 704);
    for (std::size_t j = 0; j < units.size(); ++j) ASSERT_TRUE(units[j] == kNewUnit || units[j] == kept[j]);
  }
}

TEST(UnitMap, JointSetsMoveTheThreeMatricesTogetherAndSeparateOnesDoNot) {
  const PermutationCache permutations(1, kDense);
  UnitMap map = shuffled(5, 704);
  const auto gate = map.units_of(FfnMatrix::kGate, 1, permutations);
  EXPECT_EQ(gate, map.units_of(FfnMatrix::kUp, 1, permutations));
  EXPECT_EQ(gate, map.units_of(FfnMatrix::kDown, 1, permutations));
  EXPECT_NE(gate, map.units_of(FfnMatrix::kGate, 2, permutations));  // another seed
  map.joint = false;
  std::set<std::vector<std::int32_t>> sets;
  for (const FfnMatrix m : {FfnMatrix::kGate, FfnMatrix::kUp, FfnMatrix::kDown}) {
    const auto units = map.units_of(m, 1, permutations);
    EXPECT_EQ(std::count(units.begin(), units.end(), kNewUnit), 704);
    sets.insert(units);
  }
  EXPECT_EQ(sets.size(), 3u);
}

TEST(UnitMap, RedrawnCountIsTheFloor) {
  EXPECT_EQ(redrawn_units(0.5, 1408), 704);
  EXPECT_EQ(redrawn_units(0.5, 7), 3);
  EXPECT_EQ(redrawn_units(0.29, 100), 29);  // 0.29 * 100 is 28.999999999999996
  EXPECT_EQ(redrawn_units(0.0, 100), 0);
  EXPECT_EQ(redrawn_units(1.0, 1408), 1408);
}

TEST(UnitMap, RangesPadAndWrapRound) {
  const PermutationCache permutations(1, kDense);
  UnitMap map;
  map.source_width = kDense;
  map.width = kWidth;
  map.begin = 3 * kWidth;
  map.rule = UnitMap::Rule::kRange;
  EXPECT_EQ(map.source_of(0, permutations), 4224);
  EXPECT_EQ(map.source_of(1279, permutations), 5503);
  EXPECT_EQ(map.source_of(1280, permutations), kPaddingUnit);
  map.rule = UnitMap::Rule::kWrap;
  EXPECT_EQ(map.source_of(1280, permutations), 0);
  map.rule = UnitMap::Rule::kNew;
  EXPECT_EQ(map.source_of(0, permutations), kNewUnit);
}

// A random split: one permutation for all rounds, no neuron twice before all have been used.
TEST(UnitMap, PermutedGoesThroughOnePermutationAgainAndAgain) {
  const PermutationCache permutations(1, kDense);
  UnitMap map;
  map.source_width = kDense;
  map.width = 688;  // 8 of them are the dense FFN
  map.layer = 3;
  map.rule = UnitMap::Rule::kPermuted;
  std::vector<std::int32_t> all;
  for (int e = 0; e < 16; ++e) {
    map.begin = e * map.width;
    for (std::int64_t j = 0; j < map.width; ++j) all.push_back(map.source_of(j, permutations));
  }
  const std::vector<std::int32_t> first(all.begin(), all.begin() + kDense);
  EXPECT_EQ(first, make_permutation(1, 3, 0, kDense));
  EXPECT_EQ(std::vector<std::int32_t>(all.begin() + kDense, all.end()), first);
}

// Sets of noisy units are chosen as those of redrawn ones, and are others.
TEST(UnitMap, NoiseReachesItsShareOfTheUnits) {
  UnitMap map = shuffled(5, 704);
  EXPECT_TRUE(map.noisy_units(FfnMatrix::kGate, 1).empty());
  map.noisy = 352;
  const auto gate = map.noisy_units(FfnMatrix::kGate, 1);
  EXPECT_EQ(std::count(gate.begin(), gate.end(), true), 352);
  EXPECT_EQ(gate, map.noisy_units(FfnMatrix::kDown, 1));
  EXPECT_NE(gate, map.noisy_units(FfnMatrix::kGate, 2));
  map.noisy = 704;
  const auto redrawn = map.units_of(FfnMatrix::kGate, 1, PermutationCache(1, kDense));
  const auto noisy = map.noisy_units(FfnMatrix::kGate, 1);
  int both = 0;
  for (std::size_t j = 0; j < noisy.size(); ++j) both += noisy[j] && redrawn[j] == kNewUnit ? 1 : 0;
  EXPECT_NEAR(both, 352, 60);  // of two independent halves; 6 deviations
  map.joint = false;
  EXPECT_NE(map.noisy_units(FfnMatrix::kUp, 1), map.noisy_units(FfnMatrix::kDown, 1));
}

UpcycleConfig recipe(ExpertMethod method, double reinit, bool renormalised) {
  UpcycleConfig c;
  c.target = {.num_experts = kExperts,
              .num_experts_per_tok = 4,
              .moe_intermediate_size = kWidth,
              .shared_expert_intermediate_size = 5632,
              .norm_topk_prob = renormalised};
  c.experts.method = method;
  c.experts.reinit = reinit;
  c.shared.method = SharedMethod::kZero;
  return c;
}

double scale_of(const UpcycleConfig& config, std::int64_t dense_width) {
  return resolve_scale(config, dense_width, RouterScore::kSoftmax);
}

TEST(Scale, PreservesTheDenseFunction) {
  EXPECT_NEAR(scale_of(recipe(ExpertMethod::kVirtualGroup, 0, false), kDense), 60, 1e-12);
  EXPECT_NEAR(scale_of(recipe(ExpertMethod::kVirtualGroup, 0, true), kDense), 4, 1e-12);
  EXPECT_NEAR(scale_of(recipe(ExpertMethod::kShuffle, 0, false), kDense), 58.6, 0.05);
  EXPECT_NEAR(scale_of(recipe(ExpertMethod::kShuffle, 0.5, false), kDense), 117.3, 0.05);
  UpcycleConfig e8g8t8 = recipe(ExpertMethod::kVirtualGroup, 0, false);
  e8g8t8.target.num_experts = 64;
  e8g8t8.target.num_experts_per_tok = 8;
  e8g8t8.target.moe_intermediate_size = 1024;
  EXPECT_NEAR(scale_of(e8g8t8, 8192), 64,
              1e-12);  // E G^2 / T = 8 * 64 / 8; its cube root is the paper's 4
  UpcycleConfig whole = recipe(ExpertMethod::kCopy, 0, true);
  EXPECT_NEAR(scale_of(whole, kWidth), 1, 1e-12);
  whole.target.norm_topk_prob = false;
  EXPECT_NEAR(scale_of(whole, kWidth), 15, 1e-12);
}

// Of sigmoids, each 1/2 at first; where they are renormalised they are as a softmax's.
TEST(Scale, OfSigmoids) {
  const auto scale = [](const UpcycleConfig& config) {
    return resolve_scale(config, kDense, RouterScore::kSigmoid);
  };
  EXPECT_NEAR(scale(recipe(ExpertMethod::kVirtualGroup, 0, false)), 2, 1e-12);  // 2 G / T, of 4 and 4
  EXPECT_NEAR(scale(recipe(ExpertMethod::kVirtualGroup, 0, true)), 4, 1e-12);
  EXPECT_NEAR(scale(recipe(ExpertMethod::kShuffle, 0, false)), 5504.0 / 1408 / 2, 1e-12);
}

TEST(Scale, IsOneWhereTheSharedExpertCarriesTheFunctionAndAsGivenOtherwise) {
  UpcycleConfig c = recipe(ExpertMethod::kShuffle, 0.5, false);
  c.shared.method = SharedMethod::kDense;
  EXPECT_EQ(scale_of(c, kDense), 1.0);
  c.experts.scale = 2.5;
  EXPECT_EQ(scale_of(c, kDense), 2.5);
  EXPECT_EQ(scale_of(recipe(ExpertMethod::kShuffle, 1.0, false), kDense),
            1.0);  // nothing is kept, so nothing to preserve
  EXPECT_EQ(scale_of(recipe(ExpertMethod::kRandom, 0, false), kDense), 1.0);
  c = recipe(ExpertMethod::kVirtualGroup, 0, true);
  c.shared.method = SharedMethod::kDense;
  c.target.shared_expert_intermediate_size = 0;  // there is no shared expert, whatever its method
  EXPECT_NEAR(scale_of(c, kDense), 4, 1e-12);
}

}  // namespace
}  // namespace upmoe
