// Which neurons count as active, and mixtures of clusters: every neuron in its place, and the function where all are
// chosen.

#include "upcycle/neuron_activity.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "tests/support/tiny_dense.h"
#include "tests/support/tolerance.h"
#include "upcycle/mixture_shape.h"
#include "upcycle/recipe_problems.h"

namespace upmoe {
namespace {

using namespace test;

double size_of_product(const NaiveVector& x, const NaiveVector& y) {
  double size = 0;
  for (std::size_t d = 0; d < x.size(); ++d) size += std::abs(x[d] * y[d]);
  return size;
}

// silu(g x) (u x) of vectors of length 1, and how far fp32 may stray from it. A factor was divided by its length
// with two roundings, and a sum of D terms takes D in any order. silu is no steeper than 1.1; it takes four, of which
// two are the exponential's, and the last product one. 1 %: what is not of the first order.
struct Active {
  double value, error;
  Active(const NaiveVector& x, const NaiveVector& gate, const NaiveVector& up) {
    const double g = std::inner_product(x.begin(), x.end(), gate.begin(), 0.0),
                 u = std::inner_product(x.begin(), x.end(), up.begin(), 0.0), silu = g / (1 + std::exp(-g));
    const double of_sum = static_cast<double>(x.size() + 4) * kUnit;
    value = std::abs(silu * u);
    error = 1.01 * (1.1 * of_sum * size_of_product(x, gate) * std::abs(u) +
                    std::abs(silu) * of_sum * size_of_product(x, up) + 5 * kUnit * value);
  }
};

class Activity : public ::testing::TestWithParam<DType> {
 protected:
  void SetUp() override {
    shape_.dtype = GetParam();
    write_tiny_dense(dir_.path() / "dense", shape_);
    source_.emplace(dir_.path() / "dense");
  }
  // 86 = 22 + 4 * 16
  static UpcycleConfig clusters() {
    UpcycleConfig c = tiny_recipe();
    c.target = {.num_experts = 4,
                .num_experts_per_tok = 4,
                .moe_intermediate_size = 16,
                .shared_expert_intermediate_size = 22,
                .norm_topk_prob = true};
    c.experts.method = ExpertMethod::kCluster;
    c.shared.method = SharedMethod::kActive;
    c.router.method = RouterMethod::kZero;
    return c;
  }
  // Tokens, no multiple of a block of them.
  std::vector<float> inputs() const {
    std::vector<float> x_TD(static_cast<std::size_t>(300 * shape_.hidden));
    normal_batch(3, 0, static_cast<std::int64_t>(x_TD.size()), x_TD.data());
    return x_TD;
  }
  static NaiveVector unit(NaiveVector v) {
    const double length = std::sqrt(std::inner_product(v.begin(), v.end(), v.begin(), 0.0));
    for (double& x : v) x /= length;
    return v;
  }
  NaiveVector row(const char* matrix, int layer, std::size_t neuron) const {
    const NaiveVector w = source_->read(fmt::format("model.layers.{}.mlp.{}_proj.weight", layer, matrix));
    const auto D = static_cast<std::size_t>(shape_.hidden);
    const auto begin = w.begin() + static_cast<std::ptrdiff_t>(neuron * D);
    return {begin, begin + static_cast<std::ptrdiff_t>(D)};
  }

  TinyShape shape_;
  TemporaryDirectory dir_;
  std::optional<TinySource> source_;
};

TEST_P(Activity, TheMostActiveNeuronsOfEveryToken) {
  const std::vector<float> x_TD = inputs();
  const auto D = static_cast<std::size_t>(shape_.hidden), F = static_cast<std::size_t>(shape_.ffn);
  constexpr std::size_t kMarkers = 10;
  const ActiveNeurons found =
      active_neurons(*source_->source.ffn(1), source_->source.dtype(), x_TD, kMarkers);
  ASSERT_EQ(found.tokens(), 300);
  std::vector<NaiveVector> gate, up;
  for (std::size_t f = 0; f < F; ++f) {
    gate.push_back(unit(row("gate", 1, f)));
    up.push_back(unit(row("up", 1, f)));
  }
  for (const std::size_t t : {0u, 1u, 255u, 256u, 299u}) {
    const auto begin = x_TD.begin() + static_cast<std::ptrdiff_t>(t * D);
    const NaiveVector x = unit(NaiveVector(begin, begin + static_cast<std::ptrdiff_t>(D)));
    NaiveVector activity, sorted;
    double error = 0;  // the largest
    for (std::size_t f = 0; f < F; ++f) {
      const Active active(x, gate[f], up[f]);
      activity.push_back(active.value);
      error = std::max(error, active.error);
    }
    sorted = activity;
    std::sort(sorted.rbegin(), sorted.rend());
    std::vector<bool> chosen(F, false);
    for (std::size_t k = 0; k < kMarkers; ++k) {
      const auto neuron = static_cast<std::size_t>(found.lists[t * kMarkers + k]);
      EXPECT_FALSE(chosen[neuron]);
      chosen[neuron] = true;
      // Among the largest: of two that change places each is wrong by its error.
      EXPECT_GE(activity[neuron], sorted[kMarkers - 1] - 2 * error) << t;
    }
  }
}

// Shared and routed experts hold each neuron once, as the order says, and together they are the dense FFN.
TEST_P(Activity, ClustersDivideTheDenseFfn) {
  UpcycleConfig c = clusters();
  Calibration told;
  for (const int layer : {0, 1})
    told.layers.push_back(clustered_layer(c, *source_->source.ffn(layer), source_->source.dtype(), inputs()));
  const Recipe recipe = make_recipe(c, source_->config(), 1, &told);
  EXPECT_EQ(recipe.scale, 4);
  const NaiveTensors made = source_->make(recipe), dense = source_->tensors();
  const ModelConfig moe = make_moe_config(c, source_->config());
  for (const int layer : {0, 1}) {
    const std::vector<std::int32_t>& order = told.layers[static_cast<std::size_t>(layer)].order;
    const auto D = static_cast<std::size_t>(shape_.hidden);
    const auto& gate = tensor(dense, fmt::format("model.layers.{}.mlp.gate_proj.weight", layer));
    for (std::size_t p = 0; p < order.size(); ++p) {
      const bool shared = p < 22;
      const std::size_t unit = shared ? p : (p - 22) % 16;
      const std::string name =
          shared ? fmt::format("model.layers.{}.mlp.shared_expert.gate_proj.weight", layer)
                 : fmt::format("model.layers.{}.mlp.experts.{}.gate_proj.weight", layer, (p - 22) / 16);
      for (std::size_t d = 0; d < D; ++d)
        ASSERT_EQ(tensor(made, name)[unit * D + d], gate[static_cast<std::size_t>(order[p]) * D + d]);
    }
    std::vector<float> z(D);
    normal_batch(5, 0, shape_.hidden, z.data());
    const NaiveVector x(z.begin(), z.end());
    const NaiveFfn names = ffn_names(source_->config(), Role::kFfnGateUp, Role::kFfnDown, layer);
    const NaiveVector expected = naive_ffn(dense, names, x), found = naive_moe(made, moe, layer, x);
    // Weights and factors are powers of two: both add up the same terms, in double and in another order.
    NaiveVector h = product(tensor(dense, names.gate), x), up = product(tensor(dense, names.up), x);
    for (std::size_t j = 0; j < h.size(); ++j) h[j] *= up[j] / (1 + std::exp(-h[j]));
    const NaiveVector& down = tensor(dense, names.down);
    for (std::size_t d = 0; d < D; ++d) {
      const auto row = down.begin() + static_cast<std::ptrdiff_t>(d * h.size());
      const double size = size_of_product({row, row + static_cast<std::ptrdiff_t>(h.size())}, h);
      EXPECT_NEAR(found[d], expected[d], 2 * static_cast<double>(h.size() + 8) * kDoubleUnit * size);
    }
  }
}

// The row of an expert is the gate row of one of its own neurons, of length 1.
TEST_P(Activity, RoutersKnowTheirExperts) {
  UpcycleConfig c = clusters();
  c.router.method = RouterMethod::kNeurons;
  const Calibration::Layer layer =
      clustered_layer(c, *source_->source.ffn(0), source_->source.dtype(), inputs());
  const auto D = static_cast<std::size_t>(shape_.hidden);
  ASSERT_EQ(layer.router_ED.size(), 4 * D);
  for (std::size_t e = 0; e < 4; ++e) {
    bool own = false;
    for (std::size_t j = 0; j < 16; ++j) {
      const NaiveVector expected =
          unit(row("gate", 0, static_cast<std::size_t>(layer.order[22 + 16 * e + j])));
      double difference = 0;
      for (std::size_t d = 0; d < D; ++d) difference += std::abs(expected[d] - layer.router_ED[e * D + d]);
      // Two roundings of each value: its row's factor and the product. The values add up to sqrt(D) at the most.
      own = own || difference <= 2.01 * kUnit * std::sqrt(static_cast<double>(D));
    }
    EXPECT_TRUE(own) << e;
  }
}

TEST_P(Activity, WhatDoesNotDivideIsTold) {
  const auto problem = [&](const UpcycleConfig& c, int sources = 1) {
    std::string all;
    for (const std::string& p : problems_of(c, source_->config(), sources)) all += p + "\n";
    return all;
  };
  EXPECT_EQ(problem(clusters()), "");
  UpcycleConfig c = clusters();
  c.target.moe_intermediate_size = 17;
  EXPECT_NE(problem(c).find("22 of the shared expert (shared.method active) and 4 x 17 are 90"),
            std::string::npos)
      << problem(c);
  EXPECT_NE(problem(clusters(), 2).find("divides one dense model, found 2"), std::string::npos);
  c = clusters();
  c.experts.method = ExpertMethod::kShuffle;
  c.router.method = RouterMethod::kNeurons;
  EXPECT_NE(problem(c).find("shared.method active needs"), std::string::npos);
  EXPECT_NE(problem(c).find("router.method neurons needs"), std::string::npos);
}

INSTANTIATE_TEST_SUITE_P(Types, Activity, ::testing::Values(DType::kF32, DType::kBF16),
                         [](const auto& param) { return std::string(name_of(param.param)); });

}  // namespace
}  // namespace upmoe
