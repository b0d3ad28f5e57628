// Low-rank adapters beside products, dense and of experts: their formula in double, and finite differences of what they
// give to the input and of their own gradients.

#include "trainer/model/adapter.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <optional>
#include <tuple>
#include <utility>

#include "tests/support/layer_rig.h"
#include "tests/support/tolerance.h"
#include "trainer/model/experts.h"
#include "trainer/model/linear.h"

namespace upmoe {
namespace {

using test::Rig;

// Through activations, as in layer_gradient_test.
constexpr double kStep = 2e-3, kTolerance = 5e-3;
// A product with its adapter is linear in each tensor alone: a step of any length is exact, and one of the values' own
// size leaves of the difference their rounding, 3.4e-7 at most in 300 draws of the forms below, in NumPy's fp32.
constexpr double kWholeStep = 1, kLinearTolerance = 1e-5;
using test::kUnit;

// Which of a product's rows a module's are, by number.
struct Part {
  std::int64_t rows, first, step;
};

Adapter make_adapter(Rig& rig, std::int64_t N, std::int64_t K, std::int64_t L,
                     const std::vector<Part>& parts) {
  Adapter adapter;
  adapter.rows = N;
  adapter.scale = 0.5f;
  for (const Part& part : parts)
    adapter.modules.push_back(
        {rig.host.param({L, K}, 0.5), rig.host.param({part.rows, L}, 0.5), part.first, part.step});
  return adapter;
}

// A sum of products, and that of their sizes.
struct Sum {
  double value = 0, size = 0;
  void add(double term) {
    value += term;
    size += std::abs(term);
  }
};

// sum over modules of scale (x a^T) b^T, where it belongs.
std::vector<Sum> naive(const Adapter& adapter, ConstTensorView x_TK) {
  const std::int64_t T = x_TK.rows(), K = x_TK.shape[1], N = adapter.rows;
  std::vector<Sum> y(static_cast<std::size_t>(T * N));
  for (const AdaptedModule& m : adapter.modules) {
    const float *a = m.a.value.as<float>(), *b = m.b.value.as<float>(), *x = x_TK.as<float>();
    const std::int64_t L = m.a.value.shape[0], own = m.b.value.shape[0];
    for (std::int64_t t = 0; t < T; ++t)
      for (std::int64_t l = 0; l < L; ++l) {
        for (std::int64_t j = 0; j < own; ++j)
          for (std::int64_t k = 0; k < K; ++k)
            y[static_cast<std::size_t>(t * N + m.first + j * m.step)].add(
                double(adapter.scale) * double(b[j * L + l]) * double(x[t * K + k]) * double(a[l * K + k]));
      }
  }
  return y;
}

// A whole product; of queries, keys and values the queries and values; gates and ups; ups alone.
const std::vector<std::vector<Part>> kForms{{{12, 0, 1}},
                                            {{6, 0, 1}, {3, 9, 1}},
                                            {{6, 0, 2}, {6, 1, 2}},
                                            {{6, 1, 2}},
                                            {{4, 0, 1}, {4, 4, 1}, {4, 8, 1}}};

class AdaptedLinear : public testing::TestWithParam<std::vector<Part>> {
 protected:
  const std::int64_t T = 7, K = 10, N = 12, L = 3;
  Rig rig;
  Linear linear{rig.host.param({N, K}, 0.4), rig.host.param({N}, 0.4),
                make_adapter(rig, N, K, L, GetParam())};
  TensorView x = rig.host.normal({T, K}, 1.0), dx = rig.host.zeros({T, K}),
             probe = rig.host.normal({T, N}, 1.0);

  TensorView output() {
    const TensorView y = rig.host.zeros({T, N});
    linear.forward(rig.ex, y, x);
    return y;
  }
  // `with` is of the adapter, which goes. The dense product rounds each of its terms K times, once for the bias, with
  // the adapter as without; where the adapter's terms are added one by one, L of each module, once with each. The
  // adapter rounds its own K times for z, and once for each of those. One more covers what is not of the first order.
  void expect_added(ConstTensorView with) {
    const std::vector<Sum> expected = naive(*linear.adapter, x);
    const auto of_z = static_cast<std::int64_t>(linear.adapter->modules.size()) * L;
    linear.adapter.reset();
    const TensorView without = output();
    const float *w = linear.weight_NK.value.as<float>(), *bias = linear.bias_N->value.as<float>();
    for (std::int64_t i = 0; i < T * N; ++i) {
      Sum dense;
      dense.add(double(bias[i % N]));
      for (std::int64_t k = 0; k < K; ++k)
        dense.add(double(x.as<float>()[i / N * K + k]) * double(w[i % N * K + k]));
      const Sum& added = expected[static_cast<std::size_t>(i)];
      const double bound =
          kUnit * (double(2 * (K + 1) + of_z + 1) * dense.size + double(K + of_z + 2) * added.size);
      EXPECT_NEAR(double(with.as<float>()[i]) - double(without.as<float>()[i]), added.value,
                  std::min(bound, 2e-5))
          << i;
    }
  }
};

TEST_P(AdaptedLinear, AddsItsProductWhereItBelongs) {
  expect_added(output());
}

TEST_P(AdaptedLinear, OfZerosChangesNoBit) {
  for (const AdaptedModule& m : linear.adapter->modules)
    std::fill_n(m.b.value.as<float>(), m.b.value.elements(), 0.0f);
  const TensorView with = output();
  linear.adapter.reset();
  const TensorView without = output();
  for (std::int64_t i = 0; i < T * N; ++i) EXPECT_EQ(with.as<float>()[i], without.as<float>()[i]) << i;
}

TEST_P(AdaptedLinear, HasTheGradientsOfFiniteDifferences) {
  const auto scalar = [&] { return test::dot(output(), probe); };
  linear.backward(rig.ex, dx, Accumulate::kOverwrite, probe, x);
  test::expect_gradient(rig.host, "x", x, dx, scalar, kWholeStep, kLinearTolerance);
  test::expect_gradient(rig.host, "weight", linear.weight_NK.value, linear.weight_NK.grad, scalar, kWholeStep,
                        kLinearTolerance);
  for (const AdaptedModule& m : linear.adapter->modules) {
    test::expect_gradient(rig.host, "a", m.a.value, m.a.grad, scalar, kWholeStep, kLinearTolerance);
    test::expect_gradient(rig.host, "b", m.b.value, m.b.grad, scalar, kWholeStep, kLinearTolerance);
  }
}

// In generation, as its weight's product.
TEST_P(AdaptedLinear, GivesARowTheSameBitsBesideOthers) {
  rig.ex.row_by_row = true;
  const TensorView all = output(), one = rig.host.zeros({1, N});
  for (std::int64_t t = 0; t < T; ++t) {
    linear.forward(rig.ex, one, x.rows(t, t + 1));
    for (std::int64_t n = 0; n < N; ++n)
      EXPECT_EQ(one.as<float>()[n], all.as<float>()[t * N + n]) << t << " " << n;
  }
  expect_added(all);
}

// The first gradient of a step is written over what was there, the second added: of small whole numbers, whose sums and
// products fp32 holds exactly in any order.
TEST_P(AdaptedLinear, GradientsAreWrittenThenAdded) {
  linear.weight_NK.grad = linear.bias_N->grad = {};  // frozen
  EXPECT_TRUE(linear.wants_input());
  const auto make_whole = [](const TensorView& v) {
    for (std::int64_t i = 0; i < v.elements(); ++i) v.as<float>()[i] = std::round(2 * v.as<float>()[i]);
  };
  make_whole(x);
  make_whole(probe);
  std::vector<std::unique_ptr<bool[]>> marks;
  for (AdaptedModule& m : linear.adapter->modules)
    for (Param* p : {&m.a, &m.b}) {
      make_whole(p->value);
      p->written = {marks.emplace_back(std::make_unique<bool[]>(1)).get(), 1};
      std::fill_n(p->grad.as<float>(), p->grad.elements(), 1e6f);
    }
  linear.backward(rig.ex, dx, Accumulate::kOverwrite, probe, x);
  std::vector<std::vector<float>> once;
  for (const AdaptedModule& m : linear.adapter->modules)
    for (const Param* p : {&m.a, &m.b})
      once.emplace_back(p->grad.as<float>(), p->grad.as<float>() + p->grad.elements());
  linear.backward(rig.ex, dx, Accumulate::kOverwrite, probe, x);
  std::size_t i = 0;
  for (const AdaptedModule& m : linear.adapter->modules)
    for (const Param* p : {&m.a, &m.b}) {
      for (std::size_t j = 0; j < once[i].size(); ++j) {
        ASSERT_LT(std::abs(once[i][j]), 1e4f);
        EXPECT_EQ(p->grad.as<float>()[j], 2 * once[i][j]);
      }
      ++i;
    }
}

INSTANTIATE_TEST_SUITE_P(Forms, AdaptedLinear, testing::ValuesIn(kForms));

// Three experts with rows, with none, and with rows again; what is made again in backward is what it was.
class AdaptedExperts : public testing::TestWithParam<std::tuple<bool, bool, bool>> {};

TEST_P(AdaptedExperts, HaveTheGradientsOfFiniteDifferences) {
  const auto [gates, downs, keeps_all] = GetParam();
  Rig rig;
  const std::int64_t e = 3, R = 9, D = 8, F = 5, L = 2;
  Experts experts{{rig.host.normal({e, 2 * F, D}, 0.4), {}}, {rig.host.normal({e, D, F}, 0.4), {}}, {}};
  if (!keeps_all) experts.keeps = {.rows = false, .gate_up = false, .hidden = false};
  const auto module = [&](std::int64_t N, std::int64_t K, std::int64_t first, std::int64_t step) {
    return AdaptedModule{rig.host.param({e, L, K}, 0.5), rig.host.param({e, N, L}, 0.5), first, step};
  };
  if (gates) experts.gate_up_adapter = Adapter{{module(F, D, 0, 2), module(F, D, 1, 2)}, 2 * F, 0.5f};
  if (downs) experts.down_adapter = Adapter{{module(D, F, 0, 1)}, D, 0.5f};
  if (!gates) experts.gate_up_adapter = Adapter{{module(F, D, 1, 2)}, 2 * F, 0.5f};  // ups alone
  EXPECT_FALSE(experts.fuses(rig.ex));
  const std::vector<std::int32_t> offsets{0, 4, 4, 9};
  const std::vector<std::int64_t> on_host(offsets.begin(), offsets.end());
  const TensorView x = rig.host.normal({R, D}, 1.0), probe = rig.host.normal({R, D}, 1.0),
                   weight = rig.host.constant({R, 1}, 0.7f);
  std::vector<std::int32_t> order(static_cast<std::size_t>(R));
  std::iota(order.begin(), order.end(), 0);
  const ConstTensorView index_R = host_view(std::as_const(order).data(), {R});
  const Experts::Rows picked{.x = {x, index_R, 1},
                             .lasting = false,
                             .weight_R1 = weight,
                             .experts = {host_view(offsets.data(), {e + 1}), on_host}};
  const ops::PickedRows dy{probe, index_R, 1};
  const auto scalar = [&] {
    Experts::Saved s;
    const std::size_t mark = rig.keep.mark();
    const TensorView y = rig.host.zeros({R, D});
    experts.forward(rig.ex, y, picked, rig.keep, s);
    rig.keep.rewind(mark);
    return test::dot(y, probe);
  };
  Experts::Saved saved;
  const TensorView y = rig.host.zeros({R, D});
  experts.forward(rig.ex, y, picked, rig.keep, saved);
  ScratchScope scope(*rig.ex.scratch);
  Experts::Backward b = experts.begin_backward(rig.ex, saved);
  experts.backward_rows(rig.ex, b, dy, saved);
  experts.backward_weights(rig.ex, b, saved);
  test::expect_gradient(rig.host, "x", x, b.dx_RD(), scalar, kStep, kTolerance);
  test::expect_gradient(rig.host, "row weights", weight, b.dweight_R1(), scalar, kStep, kTolerance);
  for (const std::optional<Adapter>& adapter : {experts.gate_up_adapter, experts.down_adapter}) {
    if (!adapter) continue;
    for (const AdaptedModule& m : adapter->modules) {
      test::expect_gradient(rig.host, "a", m.a.value, m.a.grad, scalar, kStep, kTolerance);
      test::expect_gradient(rig.host, "b", m.b.value, m.b.grad, scalar, kStep, kTolerance);
    }
  }
}

// A rank of more than there are experts holds adapters of none, joined and alone.
TEST(AdaptedExpertsOfARank, WithoutExperts) {
  Rig rig;
  const std::int64_t D = 8, F = 5, L = 2;
  Experts experts{{rig.host.normal({0, 2 * F, D}, 0.4), {}}, {rig.host.normal({0, D, F}, 0.4), {}}, {}};
  const auto module = [&](std::int64_t N, std::int64_t K, std::int64_t first, std::int64_t step) {
    return AdaptedModule{rig.host.param({0, L, K}, 0.5), rig.host.param({0, N, L}, 0.5), first, step};
  };
  experts.gate_up_adapter = Adapter{{module(F, D, 0, 2), module(F, D, 1, 2)}, 2 * F, 0.5f};
  experts.down_adapter = Adapter{{module(D, F, 0, 1)}, D, 0.5f};
  const std::int32_t offset = 0;
  const std::int64_t on_host = 0;
  const TensorView x = rig.host.zeros({0, D}), weight = rig.host.zeros({0, 1});
  const ConstTensorView index_R = host_view(&offset, {0});
  Experts::Saved saved;
  experts.forward(rig.ex, rig.host.zeros({0, D}),
                  {.x = {x, index_R, 1},
                   .lasting = false,
                   .weight_R1 = weight,
                   .experts = {host_view(&offset, {1}), std::span(&on_host, 1)}},
                  rig.keep, saved);
  ScratchScope scope(*rig.ex.scratch);
  Experts::Backward b = experts.begin_backward(rig.ex, saved);
  experts.backward_rows(rig.ex, b, {x, index_R, 1}, saved);
  experts.backward_weights(rig.ex, b, saved);
  EXPECT_EQ(b.dx_RD().shape, (Shape{0, D}));
}

INSTANTIATE_TEST_SUITE_P(Forms, AdaptedExperts,
                         testing::Combine(testing::Bool(), testing::Bool(), testing::Bool()));

}  // namespace
}  // namespace upmoe
