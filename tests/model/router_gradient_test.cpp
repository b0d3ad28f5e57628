// The backward of mixtures with routers of every kind against finite differences of their forward; routing is held
// fixed, which is checked: a probe that flips a top-k choice would compare two different functions.

#include <utility>

#include "configs/expert_use.h"
#include "kernels/ops/pointwise.h"
#include "tests/support/balance_of.h"
#include "tests/support/layer_rig.h"
#include "trainer/model/capacity_router.h"
#include "trainer/model/expert_choice_router.h"
#include "trainer/model/jitter_router.h"
#include "trainer/model/moe_layer.h"
#include "trainer/model/noisy_router.h"
#include "trainer/model/scaled_router.h"
#include "trainer/model/second_choice_router.h"
#include "trainer/model/sigmoid_router.h"
#include "trainer/model/softmax_router.h"
#include "trainer/model/token_mixture_router.h"

namespace upmoe {
namespace {

using test::Host;
using test::Rig;

constexpr double kStep = 2e-3;

// The scalar includes the balance and z terms, so that their gradients are tested through the router too.
struct MoeRig : Rig {
  std::int64_t T = 11, D = 12, F = 6, E = 5, K = 2;
  Param router = host.param({E, D}, 0.7);  // well apart, so that small steps flip no choice
  MoeLayer moe;
  TensorView x, probe, sums = keep.take({RouterLoad::size(E)}, DType::kF64, "router load");
  TensorView weight_sums = keep.take({E}, DType::kF64, "sums of weights"),
             chance_sums = keep.take({E}, DType::kF64, "sums of chances");
  BalanceConfig balance;
  std::vector<std::int32_t> choices, places, rows;
  RoutedTokens tokens;  // none, unless in_training()
  RoutedGroups groups;  // none, unless in_groups()

  // As a micro-batch of one sequence whose last token lies in front.
  void in_training() {
    for (std::int64_t t = 0; t < T; ++t) places.push_back(static_cast<std::int32_t>(T - 1 - t));
    rows = places;
    tokens = {host_view(std::as_const(places).data(), {T}), host_view(std::as_const(rows).data(), {T}), T, 3,
              1000};
    tokens.pool = self.get();
  }

  // All tokens at one position, the last one in front: groups of four, four and three.
  void in_groups() {
    for (std::int64_t t = 0; t < T; ++t) rows.push_back(static_cast<std::int32_t>(T - 1 - t));
    groups = {{host_view(std::as_const(rows).data(), {T}), T, 4}, self.get()};
  }

  explicit MoeRig(bool renormalize, AuxKind kind, double scale = 1) {
    moe.num_experts = E;
    moe.router = make_softmax_router({router}, K, renormalize);
    if (scale != 1) moe.router = make_scaled_router(std::move(moe.router), scale);
    moe.exchange = make_exchange({E, 1}, *self, {});
    moe.experts.gate_up_eGD = host.param({E, 2 * F, D}, 0.4);
    moe.experts.down_eDF = host.param({E, D, F}, 0.4);
    moe.shared.emplace();
    moe.shared->tp = self.get();
    moe.shared->gate_up = {host.param({2 * F, D}, 0.4), std::nullopt};
    moe.shared->down = {host.param({D, F}, 0.4), std::nullopt};
    moe.shared->gate_1D = host.param({1, D}, 0.4);
    x = host.normal({T, D}, 1.0);
    probe = host.normal({T, D}, 1.0);
    balance.terms = {{kind, 3.0}};
    balance.z_coefficient = 0.5;
  }

  RouterLoad counted_load() const {
    RouterLoad load{sums};
    if (balance.has(AuxKind::kImportance)) load.weight_E = weight_sums;
    if (balance.has(AuxKind::kLoad)) load.chance_E = chance_sums;
    return load;
  }

  test::BalanceOf terms() const {
    const LoadRow row{E, 0, false, balance.has(AuxKind::kImportance), balance.has(AuxKind::kLoad)};
    test::CountedMixture counted;
    const RouterLoad load = counted_load();
    for (const TensorView& part : {load.sums_L, load.weight_E, load.chance_E})
      for (std::int64_t i = 0; part.given() && i < part.elements(); ++i)
        counted.loads_L.push_back(part.as<double>()[i]);
    return test::balance_of(balance, {T, 1, row}, {counted});
  }

  double scalar() {
    MoeLayer::Saved s;
    const std::size_t mark = keep.mark();
    const TensorView y = host.zeros({T, D});
    RouterBalance counted;
    counted.load = counted_load();
    counted.tokens = tokens;
    counted.groups = groups;
    moe.forward(ex, y, x, {}, counted, keep, s);
    const std::int32_t* index = s.router.index_TK.as<std::int32_t>();
    EXPECT_TRUE(std::equal(choices.begin(), choices.end(), index)) << "a step flipped a routing choice";
    const test::BalanceOf b = terms();
    keep.rewind(mark);
    return test::dot(y, probe) + 3.0 * b.aux.front() + balance.z_coefficient * b.z;
  }
};

void check_moe(MoeRig& rig) {
  MoeLayer::Saved saved;
  const TensorView y = rig.host.zeros({rig.T, rig.D}), dx = rig.host.zeros({rig.T, rig.D});
  RouterBalance balance;
  balance.load = rig.counted_load();
  balance.tokens = rig.tokens;
  balance.groups = rig.groups;
  rig.moe.forward(rig.ex, y, rig.x, {}, balance, rig.keep, saved);
  const TensorView& chosen = saved.router.index_TK;
  rig.choices.assign(chosen.as<std::int32_t>(), chosen.as<std::int32_t>() + chosen.elements());
  const test::BalanceOf terms = rig.terms();
  balance.terms.aux = host_view(terms.gradient[0].data(), {rig.E});
  balance.terms.z_scale = z_scale_of(rig.balance, rig.T);
  if (balance.load.weight_E.given())
    balance.weight_gradient_E = host_view(terms.weight_gradient[0].data(), {rig.E});
  if (balance.load.chance_E.given())
    balance.chance_gradient_E = host_view(terms.chance_gradient[0].data(), {rig.E});
  rig.moe.backward(rig.ex, dx, rig.probe, balance, saved);
  const auto scalar = [&] { return rig.scalar(); };
  const double step = 5e-4;  // smaller than elsewhere: no flips
  test::expect_gradient(rig.host, "x", rig.x, dx, scalar, step, 1e-2);
  test::expect_gradient(rig.host, "router", rig.router.value, rig.router.grad, scalar, step, 1e-2);
  test::expect_gradient(rig.host, "experts in", rig.moe.experts.gate_up_eGD.value,
                        rig.moe.experts.gate_up_eGD.grad, scalar, kStep, 1e-2);
  test::expect_gradient(rig.host, "experts out", rig.moe.experts.down_eDF.value,
                        rig.moe.experts.down_eDF.grad, scalar, kStep, 1e-2);
  test::expect_gradient(rig.host, "shared gate", rig.moe.shared->gate_1D->value,
                        rig.moe.shared->gate_1D->grad, scalar, kStep, 1e-2);
}

// bf16 rows beside an fp32 weight: what the fp32 router makes of the same values, only its input gradient rounded.
TEST(RouterGradient, RouterWiderThanItsRows) {
  MoeRig rig(true, AuxKind::kHf);
  Host& host = rig.host;
  const TensorView x = host.normal({rig.T, rig.D}, 1.0), before = host.normal({rig.T, rig.D}, 1e-3),
                   dweight_TK = host.normal({rig.T, rig.K}, 1.0);
  const auto narrow = [&](TensorView wide) {
    TensorView rows = host.zeros(wide.shape);
    rows.dtype = DType::kBF16;
    ops::cast(rig.ex, rows, wide);
    ops::cast(rig.ex, wide, rows);  // the same values
    return rows;
  };
  const TensorView x_bf16 = narrow(x), dx_bf16 = narrow(before);
  const TensorView grad = rig.router.grad, wide_grad = host.zeros(grad.shape);
  RouterBalance balance;
  balance.terms.aux = host.normal({rig.E}, 1.0);
  Router::Saved mixed, wide;
  rig.moe.router->forward(rig.ex, x_bf16, balance, rig.keep, mixed);
  rig.moe.router->forward(rig.ex, x, balance, rig.keep, wide);
  rig.moe.router->backward(rig.ex, before, dweight_TK, balance, wide);
  ops::cast(rig.ex, wide_grad, grad);
  ops::fill(rig.ex, grad, 0.0f);
  rig.moe.router->backward(rig.ex, dx_bf16, dweight_TK, balance, mixed);
  const auto values = [](ConstTensorView t) {
    return std::vector(t.as<float>(), t.as<float>() + t.elements());
  };
  EXPECT_EQ(values(mixed.probs_TE), values(wide.probs_TE));
  EXPECT_EQ(values(mixed.weight_TK), values(wide.weight_TK));
  EXPECT_EQ(values(grad), values(wide_grad));
  for (std::int64_t i = 0; i < before.elements(); ++i)
    EXPECT_EQ(dx_bf16.as<bf16>()[i].bits, to_bf16(before.as<float>()[i]).bits) << i;
}

TEST(RouterGradient, MoePooledBalance) {
  MoeRig rig(false, AuxKind::kHf);
  check_moe(rig);
}
TEST(RouterGradient, MoeRenormalised) {
  MoeRig rig(true, AuxKind::kHf);
  check_moe(rig);
}
TEST(RouterGradient, MoeOfScaledWeights) {
  for (const bool renormalize : {false, true}) {
    MoeRig rig(renormalize, AuxKind::kHf, 2.5);
    check_moe(rig);
  }
}
TEST(RouterGradient, AFactorIsOnTheChosenWeightsAlone) {
  MoeRig plain(true, AuxKind::kHf), scaled(true, AuxKind::kHf, 2.5);
  Router::Saved before, after;
  const Choices one = plain.moe.router->forward(plain.ex, plain.x, {}, plain.keep, before),
                other = scaled.moe.router->forward(scaled.ex, scaled.x, {}, scaled.keep, after);
  for (std::int64_t i = 0; i < one.weight_TK.elements(); ++i) {
    EXPECT_EQ(other.index_TK.as<std::int32_t>()[i], one.index_TK.as<std::int32_t>()[i]);
    EXPECT_EQ(other.weight_TK.as<float>()[i], 2.5f * one.weight_TK.as<float>()[i]);
    EXPECT_EQ(after.weight_TK.as<float>()[i], one.weight_TK.as<float>()[i]) << "the router's own";
  }
}
TEST(RouterGradient, MoeSwitchBalance) {
  MoeRig rig(false, AuxKind::kSwitch);
  check_moe(rig);
}
TEST(RouterGradient, MoeSigmoidScores) {
  for (const bool renormalize : {false, true}) {
    MoeRig rig(renormalize, AuxKind::kHf);
    const TensorView bias_E = rig.host.normal({rig.E}, 0.2);
    rig.moe.router =
        make_sigmoid_router({rig.router}, bias_E, rig.K, {.renormalize = renormalize, .scale = 2.5f});
    check_moe(rig);
  }
}

// What is dropped is frozen: by order it depends on the choices alone.
TEST(RouterGradient, MoeWithinCapacity) {
  for (const bool renormalize : {false, true}) {
    MoeRig rig(renormalize, AuxKind::kSwitch, 2.5);
    rig.in_training();
    rig.moe.router = make_capacity_router(std::move(rig.moe.router), {rig.E, 0.5});
    MoeLayer::Saved saved;
    RouterBalance balance;
    balance.tokens = rig.tokens;
    const TensorView y = rig.host.zeros({rig.T, rig.D});
    rig.moe.forward(rig.ex, y, rig.x, {}, balance, rig.keep, saved);
    EXPECT_LT(saved.plan.received(), rig.T * rig.K) << "some are dropped";
    EXPECT_LE(saved.plan.received(), rig.E * expert_capacity(0.5, rig.T * rig.K, rig.E));
    check_moe(rig);
  }
}
TEST(RouterGradient, MoeOfDrawnSecondChoices) {
  MoeRig rig(true, AuxKind::kGShard);
  rig.in_training();
  rig.moe.router = make_second_choice_router(std::move(rig.moe.router));
  check_moe(rig);
}
TEST(RouterGradient, MoeOfJitteredInput) {
  MoeRig rig(false, AuxKind::kSwitch);
  rig.in_training();
  rig.moe.router = make_jitter_router(std::move(rig.moe.router), 0.2);
  check_moe(rig);
}

// Importance is of the choices' weights, whichever router gave them.
TEST(RouterGradient, MoeImportance) {
  for (const bool renormalize : {false, true}) {
    MoeRig rig(renormalize, AuxKind::kImportance);
    check_moe(rig);
    MoeRig sigmoid(renormalize, AuxKind::kImportance);
    sigmoid.moe.router =
        make_sigmoid_router({sigmoid.router}, {}, sigmoid.K, {.renormalize = renormalize, .scale = 2.5f});
    check_moe(sigmoid);
  }
}

// With the load's gradient, and that of the weight that gives the noise its scales.
TEST(RouterGradient, MoeWithNoise) {
  for (const AuxKind kind : {AuxKind::kLoad, AuxKind::kImportance, AuxKind::kSwitch}) {
    MoeRig rig(true, kind);
    rig.in_training();
    const Param noise = rig.host.param({rig.E, rig.D}, 0.2);
    rig.moe.router = make_noisy_router({rig.router}, {noise}, rig.K, true);
    check_moe(rig);
    const auto scalar = [&] { return rig.scalar(); };
    test::expect_gradient(rig.host, "noise", noise.value, noise.grad, scalar, 5e-4, 1e-2);
  }
}

// Who is taken is frozen. Of each group an expert takes two of four tokens, or of three.
TEST(RouterGradient, MoeOfExpertsThatChoose) {
  for (const double scale : {1.0, 2.5}) {
    MoeRig rig(false, AuxKind::kHf);
    rig.in_groups();
    rig.moe.router = make_expert_choice_router({rig.router}, 2);
    if (scale != 1) rig.moe.router = make_scaled_router(std::move(rig.moe.router), scale);
    MoeLayer::Saved saved;
    RouterBalance balance;
    balance.groups = rig.groups;
    rig.moe.forward(rig.ex, rig.host.zeros({rig.T, rig.D}), rig.x, {}, balance, rig.keep, saved);
    EXPECT_EQ(saved.plan.received(), rig.E * 6);
    for (std::int64_t e = 0; e < rig.E; ++e)
      EXPECT_EQ(saved.plan.dispatch.expert_offsets[static_cast<std::size_t>(e)], 6 * e) << "6 of 11 tokens";
    check_moe(rig);
  }
}
TEST(RouterGradient, MoeOfTokensInMixtures) {
  for (const double temperature : {1.0, 0.5}) {
    MoeRig rig(false, AuxKind::kHf);
    rig.in_groups();
    rig.moe.router = make_token_mixture_router({rig.router}, temperature);
    check_moe(rig);
    EXPECT_EQ(rig.sums.as<double>()[0], 3) << "each expert computes a row for each group";
  }
}

using Row = std::vector<double>;

// Of one expert, in double: its gate and up rows of a neuron are neighbours.
Row expert_of(const MoeRig& rig, std::int64_t e, const Row& x) {
  const float *gate_up = rig.moe.experts.gate_up_eGD.value.as<float>() + e * 2 * rig.F * rig.D,
              *down = rig.moe.experts.down_eDF.value.as<float>() + e * rig.D * rig.F;
  Row y(x.size(), 0.0);
  for (std::int64_t f = 0; f < rig.F; ++f) {
    double gate = 0, up = 0;
    for (std::int64_t d = 0; d < rig.D; ++d) {
      gate += double(gate_up[2 * f * rig.D + d]) * x[static_cast<std::size_t>(d)];
      up += double(gate_up[(2 * f + 1) * rig.D + d]) * x[static_cast<std::size_t>(d)];
    }
    const double hidden = gate / (1 + std::exp(-gate)) * up;
    for (std::int64_t d = 0; d < rig.D; ++d)
      y[static_cast<std::size_t>(d)] += double(down[d * rig.F + f]) * hidden;
  }
  return y;
}

// The layer's definition, a group after the other: [T, D].
std::vector<Row> mixtures_by_hand(const MoeRig& rig, double temperature) {
  std::vector<Row> x(static_cast<std::size_t>(rig.T)), y(x.size(), Row(static_cast<std::size_t>(rig.D)));
  for (std::size_t t = 0; t < x.size(); ++t)
    for (std::int64_t d = 0; d < rig.D; ++d)
      x[t].push_back(double(rig.x.as<float>()[static_cast<std::int64_t>(t) * rig.D + d]));
  const auto logit = [&](std::size_t t, std::int64_t e) {
    double h = 0;
    for (std::size_t d = 0; d < x[t].size(); ++d)
      h += double(rig.router.value.as<float>()[e * rig.D + static_cast<std::int64_t>(d)]) * x[t][d];
    return h;
  };
  for (std::size_t first = 0; first < rig.rows.size(); first += 4)
    for (std::int64_t e = 0; e < rig.E; ++e) {
      double sum = 0;
      Row mixture(static_cast<std::size_t>(rig.D));
      const std::size_t last = std::min(rig.rows.size(), first + 4);
      const auto part = [&](std::size_t i) {
        return std::exp(logit(static_cast<std::size_t>(rig.rows[i]), e) / temperature);
      };
      for (std::size_t i = first; i < last; ++i) sum += part(i);
      for (std::size_t i = first; i < last; ++i)
        for (std::size_t d = 0; d < mixture.size(); ++d)
          mixture[d] += part(i) / sum * x[static_cast<std::size_t>(rig.rows[i])][d];
      const Row output = expert_of(rig, e, mixture);
      for (std::size_t i = first; i < last; ++i)
        for (std::size_t d = 0; d < output.size(); ++d)
          y[static_cast<std::size_t>(rig.rows[i])][d] += part(i) / sum * output[d];
    }
  return y;
}

TEST(RouterGradient, MixturesOfTokensByTheirDefinition) {
  for (const double temperature : {1.0, 0.3}) {
    MoeRig rig(false, AuxKind::kHf);
    rig.in_groups();
    rig.moe.shared.reset();
    rig.moe.router = make_token_mixture_router({rig.router}, temperature);
    MoeLayer::Saved saved;
    RouterBalance balance;
    balance.groups = rig.groups;
    const TensorView y = rig.host.zeros({rig.T, rig.D});
    rig.moe.forward(rig.ex, y, rig.x, {}, balance, rig.keep, saved);
    const std::vector<Row> expected = mixtures_by_hand(rig, temperature);
    for (std::int64_t i = 0; i < y.elements(); ++i)
      EXPECT_NEAR(y.as<float>()[i],
                  expected[static_cast<std::size_t>(i / rig.D)][static_cast<std::size_t>(i % rig.D)], 1e-4);
  }
}

// Outside training nothing is drawn and nothing dropped: the very choices of the router inside.
TEST(RouterGradient, WhatTrainingDoesIsNotDoneOutside) {
  MoeRig plain(true, AuxKind::kHf), other(true, AuxKind::kHf);
  other.moe.router = make_jitter_router(
      make_capacity_router(make_second_choice_router(std::move(other.moe.router)), {other.E, 0.25}), 0.5);
  const auto choices = [](MoeRig& rig) {
    Router::Saved saved;
    RouterBalance balance;
    balance.tokens = rig.tokens;
    const Choices c = rig.moe.router->forward(rig.ex, rig.x, balance, rig.keep, saved);
    std::vector<float> all(c.weight_TK.as<float>(), c.weight_TK.as<float>() + c.weight_TK.elements());
    for (std::int64_t i = 0; i < c.index_TK.elements(); ++i)
      all.push_back(static_cast<float>(c.index_TK.as<std::int32_t>()[i]));
    return all;
  };
  EXPECT_EQ(choices(plain), choices(other));
  MoeRig noisy(true, AuxKind::kHf);
  noisy.moe.router =
      make_noisy_router({noisy.router}, {noisy.host.param({noisy.E, noisy.D}, 0.5)}, noisy.K, true);
  EXPECT_EQ(choices(plain), choices(noisy));
  noisy.in_training();
  EXPECT_NE(choices(plain), choices(noisy));
  other.in_training();
  EXPECT_NE(choices(plain), choices(other));
}

TEST(RouterGradient, CapacityIsRoundedUp) {
  EXPECT_EQ(expert_capacity(1.0, 64, 8), 8);
  EXPECT_EQ(expert_capacity(1.25, 64, 8), 10);
  EXPECT_EQ(expert_capacity(1.0, 65, 8), 9);
  EXPECT_EQ(expert_capacity(1.1, 100, 10), 11) << "1.1 * 100 / 10 is above 11 in fp64";
  EXPECT_EQ(expert_capacity(0.01, 8, 64), 1) << "never none";
  EXPECT_EQ(expert_capacity(4.0, 8, 2), 16);
}

}  // namespace
}  // namespace upmoe
