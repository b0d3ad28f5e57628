#include "kernels/ops/noisy_routing.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "kernels/ops/router_noise.h"
#include "tests/support/op_exec.h"
#include "tests/support/random_tensor.h"
#include "tests/support/reference_model.h"
#include "tests/support/tolerance.h"

namespace upmoe::test {
namespace {

constexpr std::uint64_t kKey = 11, kFirst = 1000;
constexpr std::uint32_t kLayer = 3;

struct Case {
  std::int64_t tokens, experts, k;
};

// In double, by the contract's words, from the same draws.
double noise_of(std::size_t token, std::size_t expert) {
  const auto column = static_cast<std::uint32_t>(expert), pair = column / 2 * 2;
  const auto uniform = [&](std::uint32_t of) {
    return static_cast<double>(uniform_from_bits(router_bits(kKey, kFirst + token, kLayer, of)));
  };
  const double radius = std::sqrt(-2 * std::log(uniform(pair))), angle = 2 * M_PI * uniform(pair + 1);
  return radius * (column % 2 == 0 ? std::cos(angle) : std::sin(angle));
}
double softplus_of(double x) {
  return std::log1p(std::exp(x));
}

class Noisy : public testing::TestWithParam<Case> {
 protected:
  Noisy() {
    for (std::size_t t = 0; t < place.size(); ++t) place.set(t, static_cast<double>(place.size() - 1 - t));
    OpExec ex;
    ops::add_router_noise(ex, noisy, logits, scale, draws());
    finish_ops();
    for (std::size_t t = 0; t < static_cast<std::size_t>(T); ++t) {
      std::vector<std::size_t> order(static_cast<std::size_t>(E));
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
        return noisy.get(t * order.size() + a) > noisy.get(t * order.size() + b);
      });
      for (std::size_t j = 0; j < static_cast<std::size_t>(K); ++j)
        index.set(t * static_cast<std::size_t>(K) + j, static_cast<double>(order[j]));
    }
  }
  TokenDraws draws() const { return {kKey, kFirst, kLayer, place}; }
  NoisyLogits routed() const { return {logits, scale, noisy, index}; }

  // H from h and s.
  Values noisy_of(const Values& h, const Values& s) const {
    Values H(h.size());
    for (std::size_t i = 0; i < h.size(); ++i) {
      const std::size_t t = i / static_cast<std::size_t>(E), e = i % static_cast<std::size_t>(E);
      H[i] = h[i] + noise_of(static_cast<std::size_t>(place.get(t)), e) * softplus_of(s[i]);
    }
    return H;
  }
  // The load, the choice of experts frozen.
  Values load_of(const Values& h, const Values& s) const {
    const Values H = noisy_of(h, s);
    const auto width = static_cast<std::size_t>(E), k = static_cast<std::size_t>(K);
    Values load(width, 0);
    for (std::size_t t = 0; t < static_cast<std::size_t>(T); ++t) {
      std::vector<bool> chosen(width, false);
      for (std::size_t j = 0; j < k; ++j) chosen[static_cast<std::size_t>(index.get(t * k + j))] = true;
      const double last = H[t * width + static_cast<std::size_t>(index.get(t * k + k - 1))];
      double next = -INFINITY;
      for (std::size_t e = 0; e < width; ++e)
        if (!chosen[e]) next = std::max(next, H[t * width + e]);
      for (std::size_t e = 0; e < width; ++e) {
        const double distance =
            (h[t * width + e] - (chosen[e] ? next : last)) / softplus_of(s[t * width + e]);
        load[e] += 0.5 * std::erfc(-distance / std::sqrt(2.0));
      }
    }
    return load;
  }

  const std::int64_t T = GetParam().tokens, E = GetParam().experts, K = GetParam().k;
  HostTensor logits{random_tensor({T, E}, DType::kF32, 1)}, scale{random_tensor({T, E}, DType::kF32, 2)},
      noisy{HostTensor({T, E}, DType::kF32)}, index{HostTensor({T, K}, DType::kI32)},
      place{HostTensor({T}, DType::kI32)};
};

TEST_P(Noisy, Forward) {
  expect_close(noisy.values(), noisy_of(logits.values(), scale.values()), {2e-5, 2e-5}, "noisy");
}

TEST_P(Noisy, Load) {
  HostTensor load({E}, DType::kF64);
  OpExec ex;
  ops::noisy_load(ex, load, routed());
  finish_ops();
  expect_close(load.values(), load_of(logits.values(), scale.values()), {1e-4, 1e-5}, "load");
  if (K < E) return;
  for (const double all : load.values()) EXPECT_EQ(all, static_cast<double>(T));
}

// With and without a load term, which also moves what the others are measured by.
TEST_P(Noisy, BackwardIsTheDerivative) {
  const HostTensor dnoisy = random_tensor({T, E}, DType::kF32, 3), dload = random_tensor({E}, DType::kF32, 4);
  for (const bool loaded : {false, true}) {
    HostTensor dlogits({T, E}, DType::kF32), dscale({T, E}, DType::kF32);
    OpExec ex;
    ops::add_router_noise_backward(ex, dlogits, dscale,
                                   {dnoisy, loaded ? ConstTensorView(dload) : ConstTensorView{}}, routed(),
                                   draws());
    finish_ops();
    const auto loss = [&](const Values& h, const Values& s) {
      const Values H = noisy_of(h, s), load = load_of(h, s);
      double total = 0;
      for (std::size_t i = 0; i < H.size(); ++i) total += dnoisy.get(i) * H[i];
      for (std::size_t e = 0; loaded && e < load.size(); ++e) total += dload.get(e) * load[e];
      return total;
    };
    const Values h = logits.values(), s = scale.values();
    expect_close(dlogits.values(), numeric_gradient([&](const Values& x) { return loss(x, s); }, h),
                 {1e-4, 2e-5}, "dlogits");
    expect_close(dscale.values(), numeric_gradient([&](const Values& x) { return loss(h, x); }, s),
                 {1e-4, 2e-5}, "dscale");
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, Noisy,
                         testing::Values(Case{1, 2, 1}, Case{9, 7, 2}, Case{5, 4, 4}, Case{20, 33, 8},
                                         Case{0, 8, 2}),
                         [](const auto& i) {
                           return fmt::format("{}x{}_top{}", i.param.tokens, i.param.experts, i.param.k);
                         });

// Of n independent normal numbers x the means of x, x^2 and x^4 vary by 1, 2 and 105 - 9 over n; products of neighbours
// have no correlation, not even where the two share their uniform numbers or two products a factor, and vary by 1 each:
// four in five of n add up to 0.8 / n. Each is to be within 4.5 standard deviations, beyond which lie 7 in a million.
TEST(NoisyRouting, NoiseIsNormal) {
  const std::int64_t T = 20000, E = 5;
  HostTensor place({T}, DType::kI32), noisy({T, E}, DType::kF32);
  for (std::size_t t = 0; t < place.size(); ++t) place.set(t, static_cast<double>(t));
  // softplus of this is 1.
  HostTensor zero = filled({T, E}, DType::kF32, 0),
             one = filled({T, E}, DType::kF32, std::log(std::exp(1.0) - 1));
  OpExec ex;
  ops::add_router_noise(ex, noisy, zero, one, {1, 0, 0, place});
  finish_ops();
  double mean = 0, square = 0, fourth = 0, product = 0;
  const auto n = static_cast<double>(T * E);
  for (std::size_t i = 0; i < noisy.size(); ++i) {
    const double x = noisy.get(i);
    mean += x / n;
    square += x * x / n;
    fourth += x * x * x * x / n;
    if (i % 5 < 4) product += x * noisy.get(i + 1) / n;
  }
  const auto allowed = [&](double variance) { return 4.5 * std::sqrt(variance / n); };
  EXPECT_NEAR(mean, 0, allowed(1));
  EXPECT_NEAR(square, 1, allowed(2));
  EXPECT_NEAR(fourth, 3, allowed(105 - 9));
  EXPECT_NEAR(product, 0, allowed(0.8));
}

// Scales far below and far above: finite, and no division by a noise of 0.
TEST(NoisyRouting, ExtremeScales) {
  const HostTensor logits = tensor_of({1, 4}, DType::kF32, {1, 2, 3, 4}),
                   scale = tensor_of({1, 4}, DType::kF32, {-200, -1e4, 50, 80}),
                   index = tensor_of({1, 2}, DType::kI32, {3, 2}), dnoisy = filled({1, 4}, DType::kF32, 1),
                   dload = filled({4}, DType::kF32, 1);
  HostTensor place = filled({1}, DType::kI32, 0), noisy({1, 4}, DType::kF32), dlogits({1, 4}, DType::kF32),
             dscale({1, 4}, DType::kF32), load({4}, DType::kF64);
  OpExec ex;
  ops::add_router_noise(ex, noisy, logits, scale, {1, 0, 0, place});
  ops::noisy_load(ex, load, {logits, scale, noisy, index});
  ops::add_router_noise_backward(ex, dlogits, dscale, {dnoisy, dload}, {logits, scale, noisy, index},
                                 {1, 0, 0, place});
  finish_ops();
  for (const HostTensor* t : {&noisy, &dlogits, &dscale})
    for (const double x : t->values()) EXPECT_TRUE(std::isfinite(x));
  for (const double x : load.values()) EXPECT_TRUE(x >= 0 && x <= 1) << x;
}

TEST(NoisyRouting, SumsByExpertAndTheirAdjoint) {
  const std::int64_t T = 300, E = 7, K = 3;
  const HostTensor weight = random_tensor({T, K}, DType::kF32, 1), dsum = random_tensor({E}, DType::kF32, 2);
  HostTensor index({T, K}, DType::kI32), sum({E}, DType::kF64), out({T, K}, DType::kF32);
  Values expected(7, 0), added;
  for (std::size_t i = 0; i < index.size(); ++i) {
    const std::size_t e = i * i % 7;
    index.set(i, static_cast<double>(e));
    expected[e] += weight.get(i);
    added.push_back(weight.get(i) + dsum.get(e));
  }
  OpExec ex;
  ops::sum_by_expert(ex, sum, weight, index);
  ops::add_by_expert(ex, out, weight, dsum, index);
  finish_ops();
  expect_close(sum.values(), expected, {1e-12, 1e-12}, "sum");
  expect_close(out.values(), added, {1e-6, 1e-6}, "out");
  expect_booked(ex.ledger(), "sum_by_expert", 900, 4.0 * 1800, 8.0 * 7);
  expect_booked(ex.ledger(), "add_by_expert", 900, 4.0 * (1800 + 7), 4.0 * 900);
}

}  // namespace
}  // namespace upmoe::test
