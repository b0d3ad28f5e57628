// Tensors made by a recipe, element by element against the dense model they come from.

#include "upcycle/transforms.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "tests/support/tiny_dense.h"
#include "tests/support/tolerance.h"

namespace upmoe {
namespace {

using namespace test;

std::string expert_name(int layer, int expert, const char* matrix) {
  return fmt::format("model.layers.{}.mlp.experts.{}.{}_proj.weight", layer, expert, matrix);
}

struct Moments2 {
  double mean = 0, std = 0;
};
Moments2 moments_of(const NaiveVector& x) {
  double sum = 0, square = 0;
  for (const double v : x) sum += v, square += v * v;
  const auto n = static_cast<double>(x.size());
  return {sum / n, std::sqrt(square / n - sum / n * (sum / n))};
}

class Transforms : public ::testing::TestWithParam<DType> {
 protected:
  void SetUp() override {
    shape_.dtype = GetParam();
    write_tiny_dense(dir_.path() / "dense", shape_);
    source_.emplace(dir_.path() / "dense");
    dense_ = source_->tensors();
  }
  Recipe recipe(const UpcycleConfig& config) const { return make_recipe(config, source_->config()); }
  const UnitMap& units(const Recipe& r, int layer, int expert) const {
    const int line = r.layers[static_cast<std::size_t>(layer)].experts[static_cast<std::size_t>(expert)][0];
    return std::get<ExpertMatrix>(r.lines[static_cast<std::size_t>(line)].transform).map;
  }

  TinyShape shape_;
  TemporaryDirectory dir_;
  std::optional<TinySource> source_;
  NaiveTensors dense_;
};

// Gate row, up row and down column of one neuron stay together, and keep their bits.
TEST_P(Transforms, NeuronsMoveAsTriples) {
  const Recipe r = recipe(tiny_recipe());
  const NaiveTensors made = source_->make(r);
  const PermutationCache permutations(r.seed, shape_.ffn);
  const std::size_t D = static_cast<std::size_t>(shape_.hidden), F = static_cast<std::size_t>(shape_.ffn),
                    W = 22;
  for (const int layer : {0, 1}) {
    for (int e = 0; e < 60; ++e) {
      const auto& gate = tensor(made, expert_name(layer, e, "gate"));
      const auto& up = tensor(made, expert_name(layer, e, "up"));
      const auto& down = tensor(made, expert_name(layer, e, "down"));
      const std::string ffn = fmt::format("model.layers.{}.mlp.", layer);
      for (std::size_t j = 0; j < W; ++j) {
        const auto u = static_cast<std::size_t>(
            units(r, layer, e).source_of(static_cast<std::int64_t>(j), permutations));
        for (std::size_t d = 0; d < D; ++d) {
          ASSERT_EQ(gate[j * D + d], tensor(dense_, ffn + "gate_proj.weight")[u * D + d]);
          ASSERT_EQ(up[j * D + d], tensor(dense_, ffn + "up_proj.weight")[u * D + d]);
          ASSERT_EQ(down[d * W + j], tensor(dense_, ffn + "down_proj.weight")[d * F + u]);
        }
      }
    }
  }
}

TEST_P(Transforms, RedrawChangesExactlyTheChosenNeuronsAndHasTheSourcesMoments) {
  UpcycleConfig config = tiny_recipe();
  config.experts.reinit = 0.5;
  const Recipe r = recipe(config);
  EXPECT_EQ(r.redrawn, 11);
  const NaiveTensors made = source_->make(r);
  const PermutationCache permutations(r.seed, shape_.ffn);
  const std::size_t D = static_cast<std::size_t>(shape_.hidden), F = static_cast<std::size_t>(shape_.ffn);
  for (const FfnMatrix m : {FfnMatrix::kGate, FfnMatrix::kUp, FfnMatrix::kDown}) {
    NaiveVector redrawn;
    const auto& source = tensor(dense_, fmt::format("model.layers.1.mlp.{}_proj.weight", name_of(m)));
    for (int e = 0; e < 60; ++e) {
      const auto sources = units(r, 1, e).units_of(m, r.seed, permutations);
      const auto& w = tensor(made, expert_name(1, e, name_of(m)));
      const std::size_t W = sources.size();
      for (std::size_t j = 0; j < W; ++j) {
        std::size_t equal = 0;
        for (std::size_t d = 0; d < D; ++d) {
          const bool down = m == FfnMatrix::kDown;
          const double found = down ? w[d * W + j] : w[j * D + d];
          if (sources[j] == kNewUnit) {
            redrawn.push_back(found);
          } else {
            const auto u = static_cast<std::size_t>(sources[j]);
            equal += found == (down ? source[d * F + u] : source[u * D + d]) ? 1 : 0;
          }
        }
        ASSERT_EQ(equal, sources[j] == kNewUnit ? 0 : D);
      }
    }
    const Moments2 expected = moments_of(source), found = moments_of(redrawn);
    const auto n = static_cast<double>(redrawn.size());
    ASSERT_EQ(redrawn.size(), 60u * 11 * D);
    EXPECT_NEAR(found.mean, expected.mean, 3 * expected.std / std::sqrt(n)) << name_of(m);
    EXPECT_NEAR(found.std, expected.std, 3 * expected.std / std::sqrt(2 * n)) << name_of(m);
  }
}

TEST_P(Transforms, RedrawFromConfigUsesTheInitializerRange) {
  UpcycleConfig config = tiny_recipe();
  config.experts.method = ExpertMethod::kRandom;
  config.experts.reinit_from = ReinitFrom::kConfig;
  const Recipe r = recipe(config);
  const NaiveTensors made = source_->make(r);
  NaiveVector all;
  for (int e = 0; e < 60; ++e) {
    const auto& w = tensor(made, expert_name(0, e, "down"));
    all.insert(all.end(), w.begin(), w.end());
  }
  const Moments2 found = moments_of(all);
  const auto n = static_cast<double>(all.size());
  EXPECT_NEAR(found.mean, 0, 3 * 0.02 / std::sqrt(n));
  EXPECT_NEAR(found.std, 0.02, 3 * 0.02 / std::sqrt(2 * n));
}

TEST_P(Transforms, PaddingHasRandomGateAndUpAndZeroDown) {
  UpcycleConfig config = tiny_recipe();
  config.experts.method = ExpertMethod::kVirtualGroup;
  const Recipe r = recipe(config);
  const NaiveTensors made = source_->make(r);
  const std::size_t D = static_cast<std::size_t>(shape_.hidden);
  const auto check = [&](const std::string& prefix, std::size_t width, std::size_t first) {
    for (std::size_t j = first; j < width; ++j) {
      for (std::size_t d = 0; d < D; ++d) {
        ASSERT_NE(tensor(made, prefix + "gate_proj.weight")[j * D + d], 0);
        ASSERT_NE(tensor(made, prefix + "up_proj.weight")[j * D + d], 0);
        ASSERT_EQ(tensor(made, prefix + "down_proj.weight")[d * width + j], 0);
      }
    }
    for (std::size_t d = 0; d < D; ++d) ASSERT_NE(tensor(made, prefix + "down_proj.weight")[d * width], 0);
  };
  check("model.layers.0.mlp.shared_expert.", 88, 86);
  for (const int copy : {0, 14}) check(fmt::format("model.layers.1.mlp.experts.{}.", 4 * copy + 3), 22, 20);
}

TEST_P(Transforms, NoiseIsAddedToKeptNeuronsAlone) {
  UpcycleConfig config = tiny_recipe();
  config.experts.reinit = 0.25;
  const NaiveTensors plain = source_->make(recipe(config));
  config.experts.noise = 0.05;
  const Recipe r = recipe(config);
  const NaiveTensors noisy = source_->make(r);
  const PermutationCache permutations(r.seed, shape_.ffn);
  const std::size_t D = static_cast<std::size_t>(shape_.hidden);
  for (const char* matrix : {"gate", "down"}) {
    NaiveVector noise;
    for (int e = 0; e < 60; ++e) {
      const auto sources = units(r, 0, e).units_of(FfnMatrix::kGate, r.seed, permutations);
      const auto &a = tensor(plain, expert_name(0, e, matrix)), &b = tensor(noisy, expert_name(0, e, matrix));
      for (std::size_t j = 0; j < sources.size(); ++j) {
        for (std::size_t d = 0; d < D; ++d) {
          const std::size_t at = matrix[0] == 'd' ? d * sources.size() + j : j * D + d;
          if (sources[j] == kNewUnit) {
            ASSERT_EQ(a[at], b[at]);
          } else {
            noise.push_back(b[at] - a[at]);
          }
        }
      }
    }
    const Moments2 found = moments_of(noise);
    const auto n = static_cast<double>(noise.size());
    EXPECT_NEAR(found.mean, 0, 3 * 0.05 / std::sqrt(n) + 1e-5);
    EXPECT_NEAR(found.std, 0.05, 3 * 0.05 / std::sqrt(2 * n) + 1e-4);  // bf16 rounding adds a little
  }
}

// Of half the neurons, a set for each matrix, as many noisy ones as are said, and the others keep their bits.
TEST_P(Transforms, NoiseReachesTheChosenUnitsAlone) {
  UpcycleConfig config = tiny_recipe();
  config.experts.reinit_sets = ReinitSets::kPerMatrix;
  const NaiveTensors plain = source_->make(recipe(config));
  config.experts.noise = 0.05;
  config.experts.noise_share = 0.5;
  const Recipe r = recipe(config);
  const NaiveTensors noisy = source_->make(r);
  const auto D = static_cast<std::size_t>(shape_.hidden);
  for (const FfnMatrix m : {FfnMatrix::kGate, FfnMatrix::kUp, FfnMatrix::kDown}) {
    for (const int e : {0, 7, 59}) {
      const std::vector<bool> chosen = units(r, 1, e).noisy_units(m, r.seed);
      ASSERT_EQ(std::count(chosen.begin(), chosen.end(), true), 11);
      const auto &a = tensor(plain, expert_name(1, e, name_of(m))),
                 &b = tensor(noisy, expert_name(1, e, name_of(m)));
      for (std::size_t j = 0; j < chosen.size(); ++j) {
        std::size_t equal = 0;
        for (std::size_t d = 0; d < D; ++d) {
          const std::size_t at = m == FfnMatrix::kDown ? d * chosen.size() + j : j * D + d;
          equal += a[at] == b[at] ? 1 : 0;
        }
        if (chosen[j]) {
          ASSERT_LT(equal, D / 4) << "unit " << j;  // a small number may vanish in a rounding to bf16
        } else {
          ASSERT_EQ(equal, D) << "unit " << j;
        }
      }
    }
  }
}

// A random split against the plain map: unit p of all experts' is neuron order[p mod F], the order one of each layer.
TEST_P(Transforms, RandomSplitFollowsTheLayersPermutation) {
  UpcycleConfig config = tiny_recipe();
  config.target.num_experts = 6;  // 132 of 86: into the second round
  config.experts.method = ExpertMethod::kSplit;
  config.experts.split = SplitOrder::kRandom;
  const Recipe r = recipe(config);
  EXPECT_EQ(resolve(config, source_->config()).experts.copies, 2);
  const NaiveTensors made = source_->make(r);
  const auto D = static_cast<std::size_t>(shape_.hidden), F = static_cast<std::size_t>(shape_.ffn);
  std::vector<std::int32_t> ordered(F);
  for (std::size_t u = 0; u < F; ++u) ordered[u] = static_cast<std::int32_t>(u);
  for (const int layer : {0, 1}) {
    const std::vector<std::int32_t> order = make_permutation(r.seed, layer, 0, shape_.ffn);
    ASSERT_NE(order, ordered);
    const auto& source = tensor(dense_, fmt::format("model.layers.{}.mlp.up_proj.weight", layer));
    for (std::size_t p = 0; p < 6 * 22; ++p) {
      const auto& up = tensor(made, expert_name(layer, static_cast<int>(p / 22), "up"));
      const auto u = static_cast<std::size_t>(order[p % F]);
      for (std::size_t d = 0; d < D; ++d) ASSERT_EQ(up[p % 22 * D + d], source[u * D + d]);
    }
  }
}

// What is drawn anew has the moments of the very block that it replaces, matrix by matrix: its values are the numbers
// that go with the matrix's moments, moved.
TEST_P(Transforms, BlockStatisticsAreThoseOfWhatIsReplaced) {
  UpcycleConfig config = tiny_recipe();
  config.experts.reinit = 0.25;  // 5 of 22
  config.experts.reinit_sets = ReinitSets::kPerMatrix;
  const NaiveTensors by_matrix = source_->make(recipe(config)), kept = source_->make(recipe(tiny_recipe()));
  config.experts.reinit_stats = ReinitStats::kBlock;
  const Recipe r = recipe(config);
  const NaiveTensors by_block = source_->make(r);
  const PermutationCache permutations(r.seed, shape_.ffn);
  const auto D = static_cast<std::size_t>(shape_.hidden);
  // A value is mean + std z in fp32, of moments that were rounded to it: three roundings of std z, two of the mean. In
  // bf16 there is one of its own. 1 %: what is not of the first order.
  const double rounding = 1.01 * (3 * kUnit + (GetParam() == DType::kBF16 ? kBF16Unit : 0));
  for (const FfnMatrix m : {FfnMatrix::kGate, FfnMatrix::kUp, FfnMatrix::kDown}) {
    const Moments2 whole =
        moments_of(tensor(dense_, fmt::format("model.layers.1.mlp.{}_proj.weight", name_of(m))));
    for (const int e : {0, 3, 59}) {
      const std::string name = expert_name(1, e, name_of(m));
      const auto sources = units(r, 1, e).units_of(m, r.seed, permutations);
      NaiveVector replaced, matrix, block;
      for (std::size_t j = 0; j < sources.size(); ++j) {
        for (std::size_t d = 0; d < D; ++d) {
          const std::size_t at = m == FfnMatrix::kDown ? d * sources.size() + j : j * D + d;
          if (sources[j] == kNewUnit) {
            replaced.push_back(tensor(kept, name)[at]);
            matrix.push_back(tensor(by_matrix, name)[at]);
            block.push_back(tensor(by_block, name)[at]);
          } else {
            ASSERT_EQ(tensor(by_block, name)[at], tensor(kept, name)[at]);
          }
        }
      }
      ASSERT_EQ(replaced.size(), 5 * D);
      const auto n = static_cast<double>(replaced.size());
      Moments2 of = moments_of(replaced);
      of.std *= std::sqrt(n / (n - 1));  // as of a sample
      ASSERT_GT(std::abs(of.std - whole.std) + std::abs(of.mean - whole.mean), 1e-4);
      for (std::size_t i = 0; i < block.size(); ++i) {
        const double z = (matrix[i] - whole.mean) / whole.std;
        const auto size_with = [&](double mean) { return std::abs(mean) + of.std * std::abs(z); };
        // What the matrix's value strays by comes through z, in units of its std.
        const double allowed = rounding * (size_with(of.mean) + size_with(whole.mean * of.std / whole.std));
        ASSERT_NEAR(block[i], of.mean + of.std * z, allowed);
      }
    }
  }
}

TEST_P(Transforms, RouterInitialisers) {
  UpcycleConfig config = tiny_recipe();
  config.router.std = 0.1;
  const std::size_t D = static_cast<std::size_t>(shape_.hidden);
  const auto router = [&](RouterMethod method) {
    config.router.method = method;
    return tensor(source_->make(recipe(config)), "model.layers.0.mlp.gate.weight");
  };
  for (const RouterMethod method : {RouterMethod::kNormal, RouterMethod::kUniform}) {
    const NaiveVector w = router(method);
    const auto n = static_cast<double>(w.size());
    EXPECT_NEAR(moments_of(w).mean, 0, 3 * 0.1 / std::sqrt(n)) << name_of(method);
    EXPECT_NEAR(moments_of(w).std, 0.1, 3 * 0.1 / std::sqrt(2 * n)) << name_of(method);
  }
  for (const double v : router(RouterMethod::kUniform)) ASSERT_LE(std::abs(v), 0.1 * std::sqrt(3.0) * 1.01);
  for (const double v : router(RouterMethod::kZero)) ASSERT_EQ(v, 0);
  const NaiveVector grouped = router(RouterMethod::kVirtualGroup);
  for (std::size_t e = 0; e < 60; ++e) {
    for (std::size_t d = 0; d < D; ++d) ASSERT_EQ(grouped[e * D + d], grouped[e / 4 * 4 * D + d]);
    if (e >= 4) {
      ASSERT_NE(grouped[e * D], grouped[(e - 4) * D]);
    }
  }
}

TEST_P(Transforms, SharedExpertIsThePaddedDenseFfnTimesTwoWithAClosedHalfGate) {
  const NaiveTensors made = source_->make(recipe(tiny_recipe()));
  const std::size_t D = static_cast<std::size_t>(shape_.hidden), F = static_cast<std::size_t>(shape_.ffn);
  const auto& down = tensor(made, "model.layers.1.mlp.shared_expert.down_proj.weight");
  const auto& dense_down = tensor(dense_, "model.layers.1.mlp.down_proj.weight");
  for (std::size_t d = 0; d < D; ++d) {
    for (std::size_t j = 0; j < F; ++j) ASSERT_EQ(down[d * 88 + j], 2 * dense_down[d * F + j]);
  }
  for (const double v : tensor(made, "model.layers.1.mlp.shared_expert_gate.weight")) ASSERT_EQ(v, 0);
  for (const auto& [name, values] : dense_) {
    if (name.find(".mlp.") == std::string::npos) {
      ASSERT_EQ(tensor(made, name), values) << name;
    }
  }
}

TEST_P(Transforms, FromScratchKeepsNothingButTheShapes) {
  UpcycleConfig config = tiny_recipe();
  config.experts.method = ExpertMethod::kRandom;
  config.experts.reinit_from = ReinitFrom::kConfig;
  config.shared.method = SharedMethod::kRandom;
  config.shared.scale = 1;
  config.keep_rest = false;
  const Recipe r = recipe(config);
  EXPECT_EQ(r.dropped.size(), dense_.size());
  for (const auto& [name, values] : source_->make(r)) {
    if (name.ends_with("norm.weight")) {
      for (const double v : values) ASSERT_EQ(v, 1) << name;
    } else if (name.ends_with("bias")) {
      for (const double v : values) ASSERT_EQ(v, 0) << name;
    } else {
      EXPECT_NEAR(moments_of(values).std, 0.02,
                  5 * 0.02 / std::sqrt(2.0 * static_cast<double>(values.size())))
          << name;
    }
  }
}

TEST_P(Transforms, AnySplitIntoRowsGivesTheSameBytes) {
  UpcycleConfig config = tiny_recipe();
  config.experts.reinit = 0.5;
  config.experts.noise = 0.01;
  config.experts.noise_share = 0.5;
  config.experts.reinit_stats = ReinitStats::kBlock;
  config.experts.scale = 3.0;
  const Recipe r = recipe(config);
  const PermutationCache permutations(r.seed, shape_.ffn);
  const FillContext context{source_->source, source_->survey, permutations, r.seed};
  for (const RecipeLine& line : r.lines) {
    const std::size_t row = static_cast<std::size_t>(line.columns()) * size_of(GetParam());
    std::vector<std::byte> whole(row * static_cast<std::size_t>(line.rows())), parts(whole);
    fill(line, 0, line.rows(), context, whole);
    for (std::int64_t r0 = 0; r0 < line.rows(); r0 += 5) {
      const std::int64_t r1 = std::min(line.rows(), r0 + 5);
      fill(line, r0, r1, context,
           std::span(parts).subspan(row * static_cast<std::size_t>(r0),
                                    row * static_cast<std::size_t>(r1 - r0)));
    }
    ASSERT_EQ(whole, parts) << line.target;
  }
}

INSTANTIATE_TEST_SUITE_P(Types, Transforms, ::testing::Values(DType::kF32, DType::kBF16),
                         [](const auto& param) { return std::string(name_of(param.param)); });

}  // namespace
}  // namespace upmoe
