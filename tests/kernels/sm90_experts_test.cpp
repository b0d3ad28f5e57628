// The experts' Hopper kernels as they are, on the model of the hardware, against double: random and awkward routings,
// operations that happen as early, as late and as oddly as the hardware may let them, nothing written outside, the same
// bits twice. Hundreds of routings more, drawn at random, a few seconds each:
//
//   UPMOE_SM90_ROUTINGS=300 build/release/bin/sm90_experts_test --gtest_filter='Drawn/*'

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <tuple>

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

// Relative, of Frobenius norms. Each result is rounded once to bf16, which moves none by more than 2^-9 of
// itself and so not the norm either; sums in fp32 and the exponential add less than 1e-5.
constexpr double kTolerance = 1.0 / 512 + 1e-5;

// ‖got - want‖ / ‖want‖; elements are compared as they come.
class Error {
 public:
  void add(double got, double want) {
    difference_ += (got - want) * (got - want);
    norm_ += want * want;
  }
  double relative() const { return norm_ == 0 ? std::sqrt(difference_) : std::sqrt(difference_ / norm_); }

 private:
  double difference_ = 0, norm_ = 0;
};

struct Case {
  std::vector<int> rows;
  int width, neurons;
  When when;
  std::uint64_t seed = 7;
};
void PrintTo(const Case& c, std::ostream* out) {
  *out << "seed " << c.seed << " D " << c.width << " F " << c.neurons << " rows";
  for (int rows : c.rows) *out << ' ' << rows;
}

class Sm90Experts : public testing::TestWithParam<Case> {
 protected:
  Sm90Experts() : p(make_routed_rows(random, GetParam().rows, GetParam().width, GetParam().neurons)) {}

  // `outputs` are what the body writes. It runs twice where that is quick, things happening at other moments.
  template <class Shared, class Body, class... Outputs>
  void run(int cluster, const Body& body, Outputs&... outputs) {
    const std::tuple<Outputs...> before(outputs...);
    run_once<Shared>(cluster, GetParam().when, body);
    if (HasFatalFailure() || p.rows > kQuickRows) return;
    const std::tuple<Outputs...> first(outputs...);
    std::tie(outputs...) = before;
    run_once<Shared>(cluster, When::kAnytime, body);
    EXPECT_TRUE(first == std::tie(outputs...)) << "other bits at other moments";
  }
  template <class Shared, class Body>
  void run_once(int cluster, When when, const Body& body) {
    ASSERT_NO_FATAL_FAILURE(run_on_model(sizeof(Shared), cluster, when, random(), body));
  }
  Routing routing() const { return {p.token_R.data(), p.offsets_e1.data(), p.experts}; }
  std::size_t index(int row, int width, int column = 0) const {
    return static_cast<std::size_t>(row) * static_cast<std::size_t>(width) + static_cast<std::size_t>(column);
  }
  double dot(const bf16* a, std::size_t step_a, const bf16* b, std::size_t step_b, int n) const {
    double sum = 0;
    for (std::size_t i = 0; i < static_cast<std::size_t>(n); ++i)
      sum += static_cast<double>(to_float(a[i * step_a])) * static_cast<double>(to_float(b[i * step_b]));
    return sum;
  }

  template <int kBlocks>
  void check_up();
  template <Major kWeights, int kBlocks>
  void check_rows();
  template <int kBlocks>
  void check_dhidden();
  template <bool kTransposed, bool kAdd, int kBlocks>
  void check_dweights();

  static constexpr int kQuickRows = 200;
  std::mt19937_64 random{GetParam().seed};
  RoutedRows p;
};

template <int kBlocks>
void Sm90Experts::check_up() {
  using C = UpConfig<kBlocks, 4>;
  const int D = p.width, F = p.neurons;
  Guarded<bf16> gate_up(index(p.rows, 2 * F)), hidden(index(p.rows, F));
  const TensorMap w = up_weights_map<C>(p.gate_up_EG_D.data(), p.experts, F, D);
  const UpProduct product{p.x_TD.data(), p.weight_R.data(), gate_up.data(), hidden.data(), routing(), D, F};
  run<UpShared<C>>(
      kBlocks, [&] { experts_up_kernel<C>(w, product); }, gate_up, hidden);
  Error of_gate_up, of_hidden;
  for (int r = 0; r < p.rows; ++r)
    for (int n = 0; n < F; ++n) {
      double v[2];
      for (int i = 0; i < 2; ++i) {
        const bf16* row = p.gate_up_EG_D.data() + index(p.expert(r) * 2 * F + 2 * n + i, D);
        v[i] = dot(p.x_TD.data() + index(p.token(r), D), 1, row, 1, D);
        of_gate_up.add(gate_up[index(r, 2 * F, 2 * n + i)], v[i]);
      }
      const double weight = static_cast<double>(p.weight_R[static_cast<std::size_t>(r)]);
      of_hidden.add(hidden[index(r, F, n)], v[0] / (1 + std::exp(-v[0])) * v[1] * weight);
    }
  EXPECT_LE(of_gate_up.relative(), kTolerance);
  EXPECT_LE(of_hidden.relative(), kTolerance);
  EXPECT_TRUE(gate_up.guards_stand() && hidden.guards_stand());
}
TEST_P(Sm90Experts, Up) {
  check_up<2>();
}
TEST_P(Sm90Experts, UpInBlocksOfTheirOwn) {
  check_up<1>();
}

template <Major kWeights, int kBlocks>
void Sm90Experts::check_rows() {
  using C = RowsConfig<kWeights, kBlocks, 4>;
  constexpr bool kForward = kWeights == Major::kK;
  const int inner = kForward ? p.neurons : 2 * p.neurons, columns = p.width;
  const auto& in = kForward ? p.hidden_RF : p.dgate_up_RG;
  const auto& weights = kForward ? p.down_ED_F : p.gate_up_EG_D;
  Guarded<bf16> y(index(p.rows, columns));
  const TensorMap x = rows_map(in.data(), p.rows, inner);
  const TensorMap w = rows_weights_map<C>(weights.data(), p.experts, columns, inner);
  const RowsProduct product{y.data(), p.offsets_e1.data(), p.experts, inner, columns};
  run<RowsShared<C>>(
      kBlocks, [&] { experts_rows_kernel<C>(x, w, product); }, y);
  Error of_y;
  for (int r = 0; r < p.rows; ++r)
    for (int c = 0; c < columns; ++c) {
      const std::size_t e = index(p.expert(r), inner * columns);
      const bf16* of_column = weights.data() + e + (kForward ? index(c, inner) : index(0, columns, c));
      of_y.add(y[index(r, columns, c)], dot(in.data() + index(r, inner), 1, of_column,
                                            kForward ? 1 : static_cast<std::size_t>(columns), inner));
    }
  EXPECT_LE(of_y.relative(), kTolerance);
  EXPECT_TRUE(y.guards_stand());
}
TEST_P(Sm90Experts, Down) {
  check_rows<Major::kK, 2>();
}
TEST_P(Sm90Experts, DownInBlocksOfTheirOwn) {
  check_rows<Major::kK, 1>();
}
TEST_P(Sm90Experts, DRows) {
  check_rows<Major::kMN, 2>();
}

template <int kBlocks>
void Sm90Experts::check_dhidden() {
  using C = DHiddenConfig<kBlocks, 5>;
  const int D = p.width, F = p.neurons, parts = F / C::kNeurons;
  Guarded<bf16> dgate_up(index(p.rows, 2 * F)), hidden(index(p.rows, F));
  Guarded<float> dweight(index(p.rows, parts));
  const TensorMap w = dhidden_weights_map(p.down_ED_F.data(), p.experts, F, D);
  const DHiddenProduct product{p.dout_TD.data(),
                               p.gate_up_RG.data(),
                               p.weight_R.data(),
                               dgate_up.data(),
                               hidden.data(),
                               dweight.data(),
                               routing(),
                               D,
                               F};
  run<DHiddenShared<C>>(
      kBlocks, [&] { experts_dhidden_kernel<C>(w, product); }, dgate_up, hidden, dweight);
  Error of_dgate_up, of_hidden, of_dweight;
  for (int r = 0; r < p.rows; ++r) {
    const double weight = static_cast<double>(p.weight_R[static_cast<std::size_t>(r)]);
    std::vector<double> sums(static_cast<std::size_t>(parts));
    for (int n = 0; n < F; ++n) {
      const bf16* column = p.down_ED_F.data() + index(p.expert(r) * D, F, n);
      const double da =
          dot(p.dout_TD.data() + index(p.token(r), D), 1, column, static_cast<std::size_t>(F), D);
      const double gate = static_cast<double>(to_float(p.gate_up_RG[index(r, 2 * F, 2 * n)])),
                   up = static_cast<double>(to_float(p.gate_up_RG[index(r, 2 * F, 2 * n + 1)]));
      const double s = 1 / (1 + std::exp(-gate)), silu = gate * s;
      of_dgate_up.add(dgate_up[index(r, 2 * F, 2 * n)], da * weight * up * (s + silu * (1 - s)));
      of_dgate_up.add(dgate_up[index(r, 2 * F, 2 * n + 1)], da * weight * silu);
      of_hidden.add(hidden[index(r, F, n)], silu * up * weight);
      sums[static_cast<std::size_t>(n / C::kNeurons)] += da * silu * up;
    }
    for (int part = 0; part < parts; ++part)
      of_dweight.add(dweight[index(r, parts, part)], sums[static_cast<std::size_t>(part)]);
  }
  EXPECT_LE(of_dgate_up.relative(), kTolerance);
  EXPECT_LE(of_hidden.relative(), kTolerance);
  EXPECT_LE(of_dweight.relative(), kTolerance);
  EXPECT_TRUE(dgate_up.guards_stand() && hidden.guards_stand() && dweight.guards_stand());
}
TEST_P(Sm90Experts, DHidden) {
  check_dhidden<2>();
}
TEST_P(Sm90Experts, DHiddenInBlocksOfTheirOwn) {
  check_dhidden<1>();
}

template <bool kTransposed, bool kAdd, int kBlocks>
void Sm90Experts::check_dweights() {
  using C = DWeightsConfig<kTransposed, kAdd, kBlocks, 4>;
  const int Y = kTransposed ? p.neurons : 2 * p.neurons, X = p.width;
  const auto &y = kTransposed ? p.hidden_RF : p.dgate_up_RG, &x = kTransposed ? p.dout_TD : p.x_TD;
  const auto old = random_values(random, index(p.experts * Y, X));
  Guarded<bf16> dw(old.size());
  std::copy(old.begin(), old.end(), dw.data());
  const TensorMap map = gradient_rows_map(y.data(), p.rows, Y);
  const WeightsGradient product{x.data(), dw.data(), p.ranking_E.data(), routing(), Y, X};
  run<DWeightsShared<C>>(
      kBlocks, [&] { experts_dweights_kernel<C>(map, product); }, dw);
  Error of_dw;
  for (int e = 0; e < p.experts; ++e)
    for (int i = 0; i < Y; ++i)
      for (int j = 0; j < X; ++j) {
        const std::size_t at = kTransposed ? index(e * X + j, Y, i) : index(e * Y + i, X, j);
        double want = kAdd ? static_cast<double>(to_float(old[at])) : 0;
        for (int r = p.offsets_e1[static_cast<std::size_t>(e)];
             r < p.offsets_e1[static_cast<std::size_t>(e) + 1]; ++r)
          want += static_cast<double>(to_float(y[index(r, Y, i)])) *
                  static_cast<double>(to_float(x[index(p.token(r), X, j)]));
        of_dw.add(dw[at], want);
      }
  EXPECT_LE(of_dw.relative(), kTolerance);
  EXPECT_TRUE(dw.guards_stand());
}
TEST_P(Sm90Experts, DGateUpWeights) {
  check_dweights<false, false, 1>();
}
TEST_P(Sm90Experts, DGateUpWeightsAdded) {
  check_dweights<false, true, 2>();
}
TEST_P(Sm90Experts, DDownWeights) {
  check_dweights<true, false, 2>();
}
TEST_P(Sm90Experts, DDownWeightsAdded) {
  check_dweights<true, true, 1>();
}

INSTANTIATE_TEST_SUITE_P(Routings, Sm90Experts,
                         testing::Values(Case{{0, 1, 127, 0}, 512, 256, When::kAnytime},
                                         Case{{128, 129, 64}, 512, 128, When::kEarliest},
                                         Case{{65, 0, 255, 257}, 512, 128, When::kLatest},
                                         Case{{0, 0, 63, 320}, 512, 128, When::kAnytime},
                                         Case{{0, 256, 0}, 512, 128, When::kLatest}));
// Small ones, for the edges of tiles and of a warpgroup's half of one.
INSTANTIATE_TEST_SUITE_P(
    Edges, Sm90Experts,
    testing::Values(Case{{1}, 512, 128, When::kLatest}, Case{{0, 0, 0, 1}, 512, 128, When::kAnytime},
                    Case{{1, 0, 0, 0}, 512, 128, When::kEarliest}, Case{{63}, 512, 128, When::kAnytime},
                    Case{{64, 0, 64}, 512, 128, When::kLatest}, Case{{0, 65, 0}, 512, 128, When::kAnytime},
                    Case{{127, 1}, 512, 128, When::kEarliest}, Case{{1, 128}, 512, 128, When::kAnytime},
                    Case{{129}, 512, 128, When::kLatest}, Case{{2, 3, 0, 5, 7}, 512, 128, When::kAnytime},
                    Case{{0, 255}, 512, 128, When::kEarliest}, Case{{257, 0}, 512, 128, When::kAnytime},
                    Case{{63, 0, 0, 65, 0, 1}, 512, 128, When::kAnytime},
                    Case{std::vector<int>(60, 3), 512, 128, When::kAnytime},
                    Case{{1, 1}, 512, 256, When::kLatest}));

// Of experts few and many, without rows at the beginning, in the middle and at the end, at the edges of tiles and of a
// warpgroup's part of one; in every fifth routing one of them takes all. Sixty experts have a few rows each.
Case drawn(std::uint64_t seed) {
  std::mt19937_64 random(seed);
  const auto below = [&](int n) { return static_cast<int>(random() % static_cast<std::uint64_t>(n)); };
  constexpr int kEdges[] = {0, 0, 1, 2, 63, 64, 65, 127, 128, 129, 255, 256, 257};
  const int experts = seed % 7 == 0 ? 60 : 1 + below(7);
  Case c{std::vector<int>(static_cast<std::size_t>(experts)), 512, 128 + 128 * below(2),
         std::array{When::kEarliest, When::kLatest, When::kAnytime, When::kAnytime}[seed % 4], seed};
  if (seed % 5 == 0)
    c.rows[static_cast<std::size_t>(below(experts))] = 1 + below(600);
  else
    for (int& rows : c.rows)
      rows = experts == 60 ? below(4) * below(4) : kEdges[below(static_cast<int>(std::size(kEdges)))];
  if (std::count(c.rows.begin(), c.rows.end(), 0) == experts) c.rows.back() = 1;  // a map of no rows is none
  return c;
}
std::vector<Case> drawn_cases() {
  const char* count = std::getenv("UPMOE_SM90_ROUTINGS");
  std::vector<Case> all;
  for (int i = 0; i < (count == nullptr ? 0 : std::atoi(count)); ++i)
    all.push_back(drawn(static_cast<std::uint64_t>(i)));
  return all;
}
INSTANTIATE_TEST_SUITE_P(Drawn, Sm90Experts, testing::ValuesIn(drawn_cases()));

}  // namespace
}  // namespace upmoe
