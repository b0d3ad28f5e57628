// Every variant of the experts' Hopper kernels that is compiled, on the model of the hardware: bit for bit what the
// first one computes, which sm90_experts_test compares to double, and nothing outside.

#include <gtest/gtest.h>

#include <optional>
#include <tuple>
#include <utility>

#include "kernels/cuda/sm90/experts_dhidden.cuh"
#include "kernels/cuda/sm90/experts_down.cuh"
#include "kernels/cuda/sm90/experts_dweights.cuh"
#include "kernels/cuda/sm90/experts_up.cuh"
#include "tests/kernels/sm90_on_model.h"
#include "tests/support/routed_rows.h"

namespace upmoe {
namespace {

using namespace cuda::sm90;
using sm90_twin::When;

struct Case {
  std::vector<int> rows;
  int neurons;
  When when;
  int width = 512;
};
void PrintTo(const Case& c, std::ostream* out) {
  *out << "D " << c.width << " F " << c.neurons << " rows";
  for (int rows : c.rows) *out << ' ' << rows;
}

// Calls body with the place of each variant, as a constant.
template <std::size_t kVariants, class Body>
void for_each(const ExpertVariant (&)[kVariants], const Body& body) {
  [&]<std::size_t... i>(std::index_sequence<i...>) {
    (body(std::integral_constant<std::size_t, i>()), ...);
  }
  (std::make_index_sequence<kVariants>());
}

class Sm90Variants : public testing::TestWithParam<Case> {
 protected:
  Sm90Variants() : p(make_routed_rows(random, GetParam().rows, GetParam().width, GetParam().neurons)) {}

  Routing routing() const { return {p.token_R.data(), p.offsets_e1.data(), p.experts}; }
  std::size_t elements(int rows, int columns) const {
    return static_cast<std::size_t>(rows) * static_cast<std::size_t>(columns);
  }
  // What the first variant wrote stays in `first`; every further one must have written the same, guards and all.
  template <class Shared, class Body, class... Outputs>
  void run(const ExpertVariant& v, const Body& body, std::optional<std::tuple<Outputs...>>& first,
           const Outputs&... before) {
    SCOPED_TRACE(words_of(v));
    std::tuple<Outputs...> outputs(before...);
    ASSERT_NO_FATAL_FAILURE(run_on_model(sizeof(Shared), v.blocks, GetParam().when, random(),
                                         [&] { std::apply(body, outputs); }));
    if (!first)
      first = outputs;
    else
      EXPECT_TRUE(*first == outputs) << "other bits than those of the first variant";
    std::apply([](const auto&... of) { EXPECT_TRUE((of.guards_stand() && ...)); }, outputs);
  }

  template <Major kWeights>
  void run_rows();
  template <bool kTransposed, bool kAdd>
  void run_dweights();

  std::mt19937_64 random{11};
  RoutedRows p;
};

TEST_P(Sm90Variants, Up) {
  const int F = p.neurons;
  std::optional<std::tuple<Guarded<bf16>, Guarded<bf16>>> first;
  for_each(kUpVariants, [&](auto i) {
    constexpr ExpertVariant v = kUpVariants[decltype(i)::value];
    using C = UpConfig<v.blocks, v.stages, v.order, v.lag>;
    const TensorMap w = up_weights_map<C>(p.gate_up_EG_D.data(), p.experts, F, p.width);
    run<UpShared<C>>(
        v,
        [&](auto& gate_up, auto& hidden) {
          experts_up_kernel<C>(w, UpProduct{p.x_TD.data(), p.weight_R.data(), gate_up.data(), hidden.data(),
                                            routing(), p.width, F});
        },
        first, Guarded<bf16>(elements(p.rows, 2 * F)), Guarded<bf16>(elements(p.rows, F)));
  });
}

template <Major kWeights>
void Sm90Variants::run_rows() {
  constexpr bool kForward = kWeights == Major::kK;
  const int inner = kForward ? p.neurons : 2 * p.neurons;
  const auto& in = kForward ? p.hidden_RF : p.dgate_up_RG;
  const auto& weights = kForward ? p.down_ED_F : p.gate_up_EG_D;
  const TensorMap x = rows_map(in.data(), p.rows, inner);
  std::optional<std::tuple<Guarded<bf16>>> first;
  for_each(kRowsVariants, [&](auto i) {
    constexpr ExpertVariant v = kRowsVariants[decltype(i)::value];
    using C = RowsConfig<kWeights, v.blocks, v.stages, v.order>;
    const TensorMap w = rows_weights_map<C>(weights.data(), p.experts, p.width, inner);
    run<RowsShared<C>>(
        v,
        [&](auto& y) {
          experts_rows_kernel<C>(x, w, RowsProduct{y.data(), p.offsets_e1.data(), p.experts, inner, p.width});
        },
        first, Guarded<bf16>(elements(p.rows, p.width)));
  });
}
TEST_P(Sm90Variants, Down) {
  run_rows<Major::kK>();
}
TEST_P(Sm90Variants, DRows) {
  run_rows<Major::kMN>();
}

TEST_P(Sm90Variants, DHidden) {
  const int F = p.neurons;
  const TensorMap w = dhidden_weights_map(p.down_ED_F.data(), p.experts, F, p.width);
  std::optional<std::tuple<Guarded<bf16>, Guarded<bf16>, Guarded<float>>> first;
  for_each(kDHiddenVariants, [&](auto i) {
    constexpr ExpertVariant v = kDHiddenVariants[decltype(i)::value];
    using C = DHiddenConfig<v.blocks, v.stages, v.order, v.lag>;
    run<DHiddenShared<C>>(
        v,
        [&](auto& dgate_up, auto& hidden, auto& dweight) {
          experts_dhidden_kernel<C>(
              w, DHiddenProduct{p.dout_TD.data(), p.gate_up_RG.data(), p.weight_R.data(), dgate_up.data(),
                                hidden.data(), dweight.data(), routing(), p.width, F});
        },
        first, Guarded<bf16>(elements(p.rows, 2 * F)), Guarded<bf16>(elements(p.rows, F)),
        Guarded<float>(elements(p.rows, F / C::kNeurons)));
  });
}

template <bool kTransposed, bool kAdd>
void Sm90Variants::run_dweights() {
  const int Y = kTransposed ? p.neurons : 2 * p.neurons;
  const auto &y = kTransposed ? p.hidden_RF : p.dgate_up_RG, &x = kTransposed ? p.dout_TD : p.x_TD;
  const TensorMap map = gradient_rows_map(y.data(), p.rows, Y);
  const auto old = random_values(random, elements(p.experts * Y, p.width));
  Guarded<bf16> before(old.size());
  std::copy(old.begin(), old.end(), before.data());
  std::optional<std::tuple<Guarded<bf16>>> first;
  for_each(kDWeightsVariants, [&](auto i) {
    constexpr ExpertVariant v = kDWeightsVariants[decltype(i)::value];
    using C = DWeightsConfig<kTransposed, kAdd, v.blocks, v.stages, v.order, v.lag>;
    run<DWeightsShared<C>>(
        v,
        [&](auto& dw) {
          experts_dweights_kernel<C>(
              map, WeightsGradient{x.data(), dw.data(), p.ranking_E.data(), routing(), Y, p.width});
        },
        first, before);
  });
}
TEST_P(Sm90Variants, DGateUpWeights) {
  run_dweights<false, false>();
  run_dweights<false, true>();
}
TEST_P(Sm90Variants, DDownWeights) {
  run_dweights<true, false>();
  run_dweights<true, true>();
}

// The last two: two pairs of tiles, of columns of the weights' gradients, and of rows.
INSTANTIATE_TEST_SUITE_P(Routings, Sm90Variants,
                         testing::Values(Case{{0, 1, 127, 0}, 256, When::kAnytime},
                                         Case{{257, 0, 64}, 256, When::kLatest},
                                         Case{{1, 129}, 128, When::kEarliest},
                                         Case{{0, 0, 3, 0}, 128, When::kAnytime, 1024},
                                         Case{{0, 400, 0}, 128, When::kEarliest}));

}  // namespace
}  // namespace upmoe
