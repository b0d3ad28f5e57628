#include "kernels/ops/sigmoid_routing.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numeric>

#include "tests/support/op_exec.h"
#include "tests/support/random_tensor.h"
#include "tests/support/reference_model.h"
#include "tests/support/tolerance.h"

namespace upmoe::test {
namespace {

struct Case {
  std::int64_t tokens, experts, k;
  SigmoidRule rule;
  bool biased = true;
};

double sigmoid(double x) {
  return 1 / (1 + std::exp(-x));
}

struct Routed {
  HostTensor probs, index, weight, lse;
  friend bool operator==(const Routed&, const Routed&) = default;
};

Routed route(const HostTensor& logits, const HostTensor* bias, std::int64_t k, const SigmoidRule& rule) {
  const Shape shape = ConstTensorView(logits).shape;
  OpExec ex;
  Routed r{HostTensor(shape, DType::kF32), HostTensor({shape[0], k}, DType::kI32),
           HostTensor({shape[0], k}, DType::kF32), HostTensor({shape[0]}, DType::kF32)};
  ops::route_sigmoid(ex, {r.probs, r.index, r.weight, r.lse}, logits,
                     bias == nullptr ? ConstTensorView{} : *bias, rule);
  finish_ops();
  return r;
}

// In double and by sorting: the experts of the best groups, then the best of them.
std::vector<std::size_t> choose(const Values& value, std::size_t k, const SigmoidRule& rule) {
  const std::size_t width = value.size() / static_cast<std::size_t>(rule.groups);
  const auto best_first = [](const Values& of) {
    std::vector<std::size_t> order(of.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return of[a] > of[b]; });
    return order;
  };
  Values allowed(value.size(), -INFINITY), groups;
  for (std::size_t g = 0; rule.groups > 1 && g < value.size() / width; ++g) {
    Values of(value.begin() + static_cast<std::ptrdiff_t>(g * width),
              value.begin() + static_cast<std::ptrdiff_t>((g + 1) * width));
    std::sort(of.rbegin(), of.rend());
    groups.push_back(of[0] + of[1]);
  }
  const std::vector<std::size_t> order = best_first(groups);
  for (std::size_t e = 0; e < value.size(); ++e) {
    bool in = rule.groups == 1;
    for (std::size_t i = 0; i < order.size() && i < static_cast<std::size_t>(rule.group_topk); ++i)
      in = in || order[i] == e / width;
    if (in) allowed[e] = value[e];
  }
  std::vector<std::size_t> chosen = best_first(allowed);
  chosen.resize(k);
  return chosen;
}

class Sigmoid : public testing::TestWithParam<Case> {
 protected:
  const std::int64_t T = GetParam().tokens, E = GetParam().experts, K = GetParam().k;
  const SigmoidRule rule = GetParam().rule;
  HostTensor logits{random_tensor({T, E}, DType::kF32, 1, 2.0)},
      bias{random_tensor({E}, DType::kF32, 2, 0.3)};
  const HostTensor* given = GetParam().biased ? &bias : nullptr;
};

TEST_P(Sigmoid, Forward) {
  const Routed r = route(logits, given, K, rule);
  const auto width = static_cast<std::size_t>(E), k = static_cast<std::size_t>(K);
  const Values x = logits.values();
  for (std::size_t t = 0; t < static_cast<std::size_t>(T); ++t) {
    Values s(width), value(width);
    for (std::size_t e = 0; e < width; ++e) {
      s[e] = sigmoid(x[t * width + e]);
      value[e] = s[e] + (given == nullptr ? 0 : bias.get(e));
    }
    const double sum = std::accumulate(s.begin(), s.end(), 0.0);
    for (std::size_t e = 0; e < width; ++e)
      EXPECT_NEAR(r.probs.get(t * width + e), s[e] / sum, 3e-6 * s[e] / sum);
    EXPECT_NEAR(r.lse.get(t), reference_lse(x.data() + t * width, width), 2e-6 * 10);
    const std::vector<std::size_t> chosen = choose(value, k, rule);
    double selected = 0;
    for (const std::size_t e : chosen) selected += s[e];
    for (std::size_t j = 0; j < k; ++j) {
      EXPECT_EQ(r.index.get(t * k + j), static_cast<double>(chosen[j])) << t << ", " << j;
      const double weight =
          s[chosen[j]] / (rule.renormalize ? selected : 1) * static_cast<double>(rule.scale);
      EXPECT_NEAR(r.weight.get(t * k + j), weight, 4e-6 * weight);
    }
  }
}

// The choice of experts is frozen. Every token takes another row of the balance terms' gradient.
TEST_P(Sigmoid, BackwardIsTheDerivative) {
  const Routed r = route(logits, given, K, rule);
  const HostTensor dweight = random_tensor({T, K}, DType::kF32, 3),
                   aux = random_tensor({3, E}, DType::kF32, 4, 0.3);
  HostTensor row({T}, DType::kI32), dlogits({T, E}, DType::kF32);
  for (std::size_t t = 0; t < row.size(); ++t) row.set(t, static_cast<double>(t * 2 % 3));
  OpExec ex;
  ops::route_sigmoid_backward(ex, dlogits, dweight, {aux, row, 0.05f}, {logits, r.index, r.lse}, rule);
  const auto width = static_cast<std::size_t>(E), k = static_cast<std::size_t>(K);
  const auto loss = [&](const Values& x) {
    double total = 0;
    for (std::size_t t = 0; t < static_cast<std::size_t>(T); ++t) {
      double all = 0, selected = 0, weighted = 0;
      for (std::size_t e = 0; e < width; ++e) all += sigmoid(x[t * width + e]);
      for (std::size_t j = 0; j < k; ++j) {
        const double s = sigmoid(x[t * width + static_cast<std::size_t>(r.index.get(t * k + j))]);
        selected += s;
        weighted += dweight.get(t * k + j) * s;
      }
      const double lse = reference_lse(x.data() + t * width, width);
      total += (rule.renormalize ? weighted / selected : weighted) * static_cast<double>(rule.scale) +
               0.05 * lse * lse;
      const auto of_row = static_cast<std::size_t>(row.get(t)) * width;
      for (std::size_t e = 0; e < width; ++e) total += aux.get(of_row + e) * sigmoid(x[t * width + e]) / all;
    }
    return total;
  };
  expect_close(dlogits.values(), numeric_gradient(loss, logits.values()), {2e-5, 4e-6}, "dlogits");
}

INSTANTIATE_TEST_SUITE_P(Shapes, Sigmoid,
                         testing::Values(Case{1, 1, 1, {}}, Case{7, 13, 13, {.renormalize = false}},
                                         Case{33, 60, 4, {.scale = 2.5f}}, Case{33, 60, 4, {}, false},
                                         Case{20, 64, 6, {.groups = 8, .group_topk = 3, .scale = 2.5f}},
                                         Case{9, 256, 8, {.groups = 8, .group_topk = 4}},
                                         Case{9, 64, 2, {.groups = 32, .group_topk = 1}},
                                         Case{5, 100, 8, {.groups = 2, .group_topk = 2}}, Case{0, 8, 2, {}}),
                         [](const auto& i) {
                           return fmt::format("{}x{}_top{}_{}of{}{}", i.param.tokens, i.param.experts,
                                              i.param.k, i.param.rule.group_topk, i.param.rule.groups,
                                              i.param.biased ? "" : "_unbiased");
                         });

// transformers 5.23, Dots1TopkRouter with n_group 4, topk_group 2, norm_topk_prob, routed_scaling_factor 2.5, in
// fp64: weight the identity, e_score_correction_bias_e = 0.3 cos(3 e), x_te = 2 sin(1 + 7 t + 3.3 e (1 + t)).
TEST(SigmoidRouting, AsTransformersDots1) {
  const std::int64_t T = 6, E = 16, K = 4;
  HostTensor logits({T, E}, DType::kF32), bias({E}, DType::kF32);
  for (std::int64_t e = 0; e < E; ++e) {
    const auto x = static_cast<double>(e);
    bias.set(static_cast<std::size_t>(e), 0.3 * std::cos(3 * x));
    for (std::int64_t t = 0; t < T; ++t) {
      const auto y = static_cast<double>(t);
      logits.set(static_cast<std::size_t>(t * E + e), 2 * std::sin(1 + 7 * y + 3.3 * x * (1 + y)));
    }
  }
  const Routed r =
      route(logits, &bias, K, {.groups = 4, .group_topk = 2, .renormalize = true, .scale = 2.5f});
  const Values index{2, 0, 4, 6, 0, 2, 4, 1, 0, 12, 15, 2, 8, 6, 7, 9, 4, 6, 12, 15, 4, 10, 11, 9},
      weight{0.630955,  0.6088612, 0.6356391, 0.6245447, 0.7042056, 0.6458183, 0.4631389, 0.6868372,
             0.7532946, 0.8360098, 0.5443677, 0.3663279, 0.6639017, 0.5944849, 0.6691695, 0.5724439,
             0.6788863, 0.6890744, 0.6890799, 0.4429595, 0.6524364, 0.6769934, 0.5963332, 0.5742371};
  EXPECT_EQ(r.index.values(), index);
  expect_close(r.weight.values(), weight, {2e-6, 1e-7}, "weight");
}

TEST(SigmoidRouting, TiesGoToTheLowestIndex) {
  const Routed equal = route(filled({3, 64}, DType::kF32, 0.0), nullptr, 4, {.groups = 8, .group_topk = 2});
  for (std::size_t i = 0; i < 12; ++i) EXPECT_EQ(equal.index.get(i), static_cast<double>(i % 4));
  EXPECT_NEAR(equal.weight.get(5), 0.25, 1e-7);
}

// Of logits that no exp can take, and of such that make every score vanish.
TEST(SigmoidRouting, ExtremeLogits) {
  const Routed r =
      route(tensor_of({2, 4}, DType::kF32, {1e4, -1e4, 1e4, 0, -1e4, -1e4, -1e4, -1e4}), nullptr, 2, {});
  EXPECT_EQ(r.index.values(), (Values{0, 2, 0, 1}));
  EXPECT_NEAR(r.weight.get(0), 0.5, 1e-6);
  for (std::size_t i = 0; i < 4; ++i) EXPECT_TRUE(std::isfinite(r.weight.get(i)));
  for (std::size_t i = 0; i < 8; ++i) EXPECT_TRUE(std::isfinite(r.probs.get(i)));
}

TEST(SigmoidRouting, NonFiniteLogitNamesItsPlace) {
  HostTensor logits = random_tensor({70, 60}, DType::kF32, 1);
  logits.set(50 * 60 + 17, std::nan(""));
  try {
    route(logits, nullptr, 4, {});
    ADD_FAILURE() << "NaN was accepted";
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ExitCode::kNumeric);
    EXPECT_NE(std::string(e.what()).find("token row 50 and expert 17"), std::string::npos) << e.what();
  }
}

TEST(SigmoidRouting, RefusesGroupsThatCannotBe) {
  const HostTensor logits = random_tensor({4, 12}, DType::kF32, 1);
  for (const SigmoidRule& rule :
       {SigmoidRule{.groups = 5, .group_topk = 1}, SigmoidRule{.groups = 12, .group_topk = 6},
        SigmoidRule{.groups = 4, .group_topk = 5}, SigmoidRule{.groups = 4, .group_topk = 1}})
    EXPECT_THROW(route(logits, nullptr, 4, rule), Error) << rule.groups;
}

TEST(SigmoidRouting, SameBitsForAnyThreadsAndBooks) {
  const std::int64_t T = 500, E = 60, K = 4;
  const SigmoidRule rule{.groups = 4, .group_topk = 2, .scale = 2.0f};
  const HostTensor logits = random_tensor({T, E}, DType::kF32, 1),
                   bias = random_tensor({E}, DType::kF32, 2, 0.1);
  expect_same_for_any_threads([&] { return route(logits, &bias, K, rule); });
  OpExec ex;
  Routed r = route(logits, &bias, K, rule);
  ops::route_sigmoid(ex, {r.probs, r.index, r.weight, r.lse}, logits, bias, rule);
  expect_booked(ex.ledger(), "route_sigmoid", 8.0 * T * E, 4.0 * (T * E + E), 4.0 * (T * E + 2 * T * K + T));
}

}  // namespace
}  // namespace upmoe::test
