// What the experts' Hopper kernels ask of memory for one tile, counted by the model of the hardware and printed: that
// no bank of shared memory is asked twice where once would do, and that global memory moves no sector but for what is
// in it.
//
//   build/release/bin/sm90_traffic_test --gtest_filter='*Tile*'

#include <gtest/gtest.h>

#include <cstdio>
#include <new>
#include <numeric>
#include <vector>

#include "kernels/cuda/sm90/experts_dhidden.cuh"
#include "kernels/cuda/sm90/experts_down.cuh"
#include "kernels/cuda/sm90/experts_dweights.cuh"
#include "kernels/cuda/sm90/experts_up.cuh"

namespace upmoe::cuda::sm90 {
namespace {

using sm90_twin::Access;
using sm90_twin::Demand;
using sm90_twin::Place;
using sm90_twin::Space;
using sm90_twin::Traffic;
using sm90_twin::When;

std::vector<Access> lanes(std::uintptr_t step, unsigned bytes, int count = 32) {
  std::vector<Access> all;
  for (int i = 0; i < count; ++i) all.push_back({1024 + static_cast<std::uintptr_t>(i) * step, bytes});
  return all;
}

TEST(Sm90Traffic, BanksServeAWordEach) {
  const auto taken = [](const std::vector<Access>& of) { return sm90_twin::shared_demand(of).taken; };
  EXPECT_EQ(taken(lanes(4, 4)), 1);
  EXPECT_EQ(taken(lanes(0, 4)), 1) << "one word for all";
  EXPECT_EQ(taken(lanes(8, 4)), 2);
  EXPECT_EQ(taken(lanes(128, 4)), 32);
  EXPECT_EQ(taken(lanes(132, 4)), 1);
  EXPECT_EQ(taken(lanes(8, 8)), 2) << "half a warp at a time";
  EXPECT_EQ(taken(lanes(16, 16)), 4) << "a quarter of a warp at a time";
  EXPECT_EQ(taken(lanes(128, 16)), 32);
  EXPECT_EQ(sm90_twin::shared_demand(lanes(128, 16)).least, 4);
  auto half = lanes(16, 16);
  for (std::size_t i = 8; i < 32; ++i) half[i] = {};
  EXPECT_EQ(taken(half), 1) << "those who ask for nothing take nothing";
}
TEST(Sm90Traffic, SectorsAreThirtyTwoBytes) {
  const auto of = [](const std::vector<Access>& l) { return sm90_twin::global_demand(l); };
  EXPECT_EQ(of(lanes(4, 4)).taken, 4);
  EXPECT_EQ(of(lanes(16, 16)).taken, 16);
  EXPECT_EQ(of(lanes(0, 4)).taken, 1);
  EXPECT_EQ(of(lanes(32, 4)).taken, 32);
  EXPECT_EQ(of(lanes(32, 4)).least, 4);
  auto shifted = lanes(4, 4);
  for (Access& access : shifted) access.address += 16;
  EXPECT_EQ(of(shifted).taken, 5);
}

struct alignas(1024) Rows {
  unsigned char rows[16 * kRowBytes];
};
template <bool kSwizzled>
__global__ void matrices_of_rows() {
  auto& s = dynamic_shared<Rows>();
  const u32 lane = threadIdx.x % 32, row = lane % 16, chunk = lane / 16;
  stmatrix_x4(s.rows + (kSwizzled ? swizzled(row, chunk) : row * kRowBytes + chunk * 16), 0, 0, 0, 0);
  // A lane that leaves out the last times of a loop.
  for (u32 i = 0; i < 2 + lane / 16; ++i) store_shared(s.rows + i * kRowBytes + lane * 4, lane);
}
Demand demand_of(const Traffic& traffic, std::string_view what) {
  Demand sum;
  for (const auto& [place, demand] : traffic.demands())
    if (place.what == what) sum += demand;
  return sum;
}
TEST(Sm90Traffic, TheSwizzleKeepsRowsOfAColumnInDifferentBanks) {
  const auto run = [](void (*kernel)()) {
    Traffic traffic;
    sm90_twin::run({1, 32, sizeof(Rows), 1, When::kAnytime, 3, &traffic}, kernel);
    return traffic;
  };
  const Traffic with = run(matrices_of_rows<true>), without = run(matrices_of_rows<false>);
  EXPECT_EQ(demand_of(with, "stmatrix").taken, 4);
  EXPECT_EQ(demand_of(without, "stmatrix").taken, 32);
  EXPECT_EQ(demand_of(without, "stmatrix").least, 4);
  EXPECT_EQ(demand_of(with, "store").taken, 3) << "lanes of different times in one instruction";
  EXPECT_EQ(demand_of(with, "store").bytes, (32 + 32 + 16) * 4);
}

// As a GPU's memory begins: at a multiple of 256 bytes.
template <class T>
struct Aligned {
  using value_type = T;
  static constexpr std::align_val_t kAlignment{256};
  T* allocate(std::size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), kAlignment)); }
  void deallocate(T* p, std::size_t) { ::operator delete(p, kAlignment); }
  bool operator==(const Aligned&) const = default;
};
template <class T>
using Memory = std::vector<T, Aligned<T>>;

// One expert with two whole tiles of rows, for the two blocks of a cluster.
class Sm90TrafficOfATile : public testing::Test {
 protected:
  static constexpr std::int64_t kRows = 2 * kTileRows, kWidth = 512, kNeurons = 128, kElement = 2;

  Sm90TrafficOfATile() {
    for (std::size_t r = 0; r < tokens.size(); ++r) tokens[r] = static_cast<int>(r * 37 % tokens.size());
  }
  static Memory<bf16> elements(std::int64_t rows, std::int64_t columns) {
    return Memory<bf16>(static_cast<std::size_t>(rows * columns));
  }
  Routing routing() const { return {tokens.data(), offsets.data(), 1}; }

  // `moved`: bytes of a tile from and to global memory, but for what a row has beside its elements.
  template <class Shared, class Body>
  void check(const char* name, std::int64_t tiles, std::int64_t moved, const Body& body) {
    Traffic traffic;
    sm90_twin::run({2, kBlockThreads, sizeof(Shared), 2, When::kAnytime, 5, &traffic}, body);
    std::printf("%s, each of %lld tiles:\n%s", name, static_cast<long long>(tiles),
                traffic.table(static_cast<double>(tiles)).c_str());
    for (const auto& [place, demand] : traffic.demands()) {
      const bool shared = place.space == Space::kShared;
      if (!shared && demand.bytes <= kRows * 64) continue;  // single words, for which a sector is much
      EXPECT_EQ(demand.taken, demand.least) << (shared ? "conflicts of banks: " : "sectors in vain: ")
                                            << place.what << ' ' << place.file << ':' << place.line;
    }
    const Demand global = traffic.sum(Space::kGlobal);
    EXPECT_GE(global.bytes, tiles * moved);
    EXPECT_LE(global.bytes, tiles * (moved + kTileRows * 64)) << "numbers of tokens, weights, little more";
    EXPECT_LE(static_cast<double>(global.taken), 1.02 * static_cast<double>(global.least));
    products = {demand_of(traffic, "wgmma, a").bytes / tiles, demand_of(traffic, "wgmma, b").bytes / tiles};
  }

  Memory<int> tokens = Memory<int>(kRows), offsets{0, static_cast<int>(kRows)}, ranking{0};
  Memory<float> weights = Memory<float>(kRows, 1.0f), dweights = Memory<float>(kRows);
  Memory<bf16> x = elements(kRows, kWidth), gate_up = elements(kRows, 2 * kNeurons),
               hidden = elements(kRows, kNeurons), w_up = elements(2 * kNeurons, kWidth),
               w_down = elements(kWidth, kNeurons), out = elements(kRows, kWidth),
               dgate_up = elements(kRows, 2 * kNeurons);
  struct Products {  // bytes of a tile that the tensor cores read from shared memory
    std::int64_t a, b;
  } products{};
};

TEST_F(Sm90TrafficOfATile, Up) {
  using C = UpConfig<2, 4>;
  const TensorMap w = up_weights_map<C>(w_up.data(), 1, kNeurons, kWidth);
  const UpProduct p{x.data(), weights.data(), gate_up.data(), hidden.data(), routing(), kWidth, kNeurons};
  // 128 rows, half of 256 columns of weights, the other half by the other block; gates, ups, hidden.
  check<UpShared<C>>("K1, gates and ups with SwiGLU", 2,
                     kElement * ((128 + 128) * kWidth + 128 * (256 + 128)),
                     [&] { experts_up_kernel<C>(w, p); });
  EXPECT_EQ(products.a, kElement * 128 * kWidth);
  EXPECT_EQ(products.b, kElement * 2 * 256 * kWidth) << "by each of two warpgroups";
}
TEST_F(Sm90TrafficOfATile, Down) {
  using C = RowsConfig<Major::kK, 2, 4>;
  const TensorMap in = rows_map(hidden.data(), kRows, kNeurons),
                  w = rows_weights_map<C>(w_down.data(), 1, kWidth, kNeurons);
  const RowsProduct p{out.data(), offsets.data(), 1, kNeurons, kWidth};
  check<RowsShared<C>>("K1', down", 4, kElement * ((128 + 128) * kNeurons + 128 * 256),
                       [&] { experts_rows_kernel<C>(in, w, p); });
  EXPECT_EQ(products.b, kElement * 2 * 256 * kNeurons);
}
TEST_F(Sm90TrafficOfATile, DRows) {
  using C = RowsConfig<Major::kMN, 2, 4>;
  const TensorMap in = rows_map(dgate_up.data(), kRows, 2 * kNeurons),
                  w = rows_weights_map<C>(w_up.data(), 1, kWidth, 2 * kNeurons);
  const RowsProduct p{out.data(), offsets.data(), 1, 2 * kNeurons, kWidth};
  check<RowsShared<C>>("K1', dX", 4, kElement * ((128 + 128) * 2 * kNeurons + 128 * 256),
                       [&] { experts_rows_kernel<C>(in, w, p); });
  EXPECT_EQ(products.b, kElement * 2 * 256 * 2 * kNeurons);
}
TEST_F(Sm90TrafficOfATile, DHidden) {
  using C = DHiddenConfig<2, 5>;
  const TensorMap w = dhidden_weights_map(w_down.data(), 1, kNeurons, kWidth);
  const DHiddenProduct p{x.data(),        gate_up.data(), weights.data(), dgate_up.data(), hidden.data(),
                         dweights.data(), routing(),      kWidth,         kNeurons};
  // Gates and ups are read, their gradients and hidden written.
  check<DHiddenShared<C>>("K2, dH", 2, kElement * ((128 + 64) * kWidth + 128 * (256 + 256 + 128)),
                          [&] { experts_dhidden_kernel<C>(w, p); });
  EXPECT_EQ(products.b, kElement * 2 * 128 * kWidth) << "for each half of the rows";
}
TEST_F(Sm90TrafficOfATile, DWeights) {
  using C = DWeightsConfig<false, false, 2, 4>;
  const TensorMap y = gradient_rows_map(dgate_up.data(), kRows, 2 * kNeurons);
  const WeightsGradient p{x.data(), w_up.data(), ranking.data(), routing(), 2 * kNeurons, kWidth};
  check<DWeightsShared<C>>("K3, dW1", 4, kElement * ((64 + 256) * kRows + 128 * 256),
                           [&] { experts_dweights_kernel<C>(y, p); });
  EXPECT_EQ(products.a, kElement * 128 * kRows);
}
TEST_F(Sm90TrafficOfATile, DWeightsTransposedAndAdded) {
  using C = DWeightsConfig<true, true, 2, 4>;
  const TensorMap y = gradient_rows_map(hidden.data(), kRows, kNeurons);
  const WeightsGradient p{x.data(), w_down.data(), ranking.data(), routing(), kNeurons, kWidth};
  check<DWeightsShared<C>>("K3, dW2 added", 2, kElement * ((64 + 256) * kRows + 2 * 128 * 256),
                           [&] { experts_dweights_kernel<C>(y, p); });
}

}  // namespace
}  // namespace upmoe::cuda::sm90
