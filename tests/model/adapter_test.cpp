// Low-rank adapters beside products, dense and of experts: their formula in double, and finite differences of what they
// give to the input and of their own gradients.

#include "trainer/model/adapter.h"

#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <numeric>
#include <optional>
#include <tuple>
#include <utility>

#include "tests/support/layer_rig.h"
#include "trainer/model/experts.h"
#include "trainer/model/linear.h"

namespace upmoe {
namespace {

using test::Rig;

constexpr double kStep = 2e-3, kTolerance = 5e-3;

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

// sum over modules of scale (x a^T) b^T, where it belongs.
std::vector<double> naive(const Adapter& adapter, ConstTensorView x_TK) {
  const std::int64_t T = x_TK.rows(), K = x_TK.shape[1], N = adapter.rows;
  std::vector<double> y(static_cast<std::size_t>(T * N));
  for (const AdaptedModule& m : adapter.modules) {
    const float *a = m.a.value.as<float>(), *b = m.b.value.as<float>(), *x = x_TK.as<float>();
    const std::int64_t L = m.a.value.shape[0], own = m.b.value.shape[0];
    for (std::int64_t t = 0; t < T; ++t)
      for (std::int64_t l = 0; l < L; ++l) {
        double z = 0;
        for (std::int64_t k = 0; k < K; ++k) z += double(x[t * K + k]) * double(a[l * K + k]);
        for (std::int64_t j = 0; j < own; ++j)
          y[static_cast<std::size_t>(t * N + m.first + j * m.step)] +=
              double(adapter.scale) * z * double(b[j * L + l]);
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
};

TEST_P(AdaptedLinear, AddsItsProductWhereItBelongs) {
  const TensorView with = output();
  const std::vector<double> expected = naive(*linear.adapter, x);
  linear.adapter.reset();
  const TensorView without = output();
  for (std::int64_t i = 0; i < T * N; ++i)
    EXPECT_NEAR(double(with.as<float>()[i]) - double(without.as<float>()[i]), expected[std::size_t(i)], 2e-5)
        << i;
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
  test::expect_gradient(rig.host, "x", x, dx, scalar, kStep, kTolerance);
  test::expect_gradient(rig.host, "weight", linear.weight_NK.value, linear.weight_NK.grad, scalar, kStep,
                        kTolerance);
  for (const AdaptedModule& m : linear.adapter->modules) {
    test::expect_gradient(rig.host, "a", m.a.value, m.a.grad, scalar, kStep, kTolerance);
    test::expect_gradient(rig.host, "b", m.b.value, m.b.grad, scalar, kStep, kTolerance);
  }
}

// In generation, as its weight's product.
TEST_P(AdaptedLinear, GivesARowTheSameBitsBesideOthers) {
  rig.ex.row_by_row = true;
  const TensorView all = output(), one = rig.host.zeros({1, N});
  const std::vector<double> expected = naive(*linear.adapter, x);
  for (std::int64_t t = 0; t < T; ++t) {
    linear.forward(rig.ex, one, x.rows(t, t + 1));
    for (std::int64_t n = 0; n < N; ++n)
      EXPECT_EQ(one.as<float>()[n], all.as<float>()[t * N + n]) << t << " " << n;
  }
  linear.adapter.reset();
  const TensorView without = output();
  for (std::int64_t i = 0; i < T * N; ++i)
    EXPECT_NEAR(double(all.as<float>()[i]) - double(without.as<float>()[i]), expected[std::size_t(i)], 2e-5)
        << i;
}

// The first gradient of a step is written over what was there, the second added.
TEST_P(AdaptedLinear, GradientsAreWrittenThenAdded) {
  linear.weight_NK.grad = linear.bias_N->grad = {};  // frozen
  EXPECT_TRUE(linear.wants_input());
  std::vector<std::unique_ptr<bool[]>> marks;
  for (AdaptedModule& m : linear.adapter->modules)
    for (Param* p : {&m.a, &m.b}) {
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
        EXPECT_NEAR(p->grad.as<float>()[j], 2 * once[i][j], 1e-4f * (1 + std::abs(once[i][j])));
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

INSTANTIATE_TEST_SUITE_P(Forms, AdaptedExperts,
                         testing::Combine(testing::Bool(), testing::Bool(), testing::Bool()));

}  // namespace
}  // namespace upmoe
