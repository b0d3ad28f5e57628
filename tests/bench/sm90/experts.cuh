#pragma once
// The experts' products at full width on random data, and one function that launches each kernel.

#include <algorithm>
#include <cmath>
#include <random>

#include "kernels/cuda/sm90/experts_dhidden.cuh"
#include "kernels/cuda/sm90/experts_down.cuh"
#include "kernels/cuda/sm90/experts_dweights.cuh"
#include "kernels/cuda/sm90/experts_up.cuh"
#include "tests/bench/sm90/gpu.cuh"

namespace sm90_bench {

using namespace upmoe::cuda::sm90;
using upmoe::bf16;

static __global__ void fill_random(bf16* x, std::size_t n, std::uint64_t seed, float scale) {
  for (std::size_t i = blockIdx.x * std::size_t{blockDim.x} + threadIdx.x; i < n;
       i += std::size_t{gridDim.x} * blockDim.x) {
    std::uint64_t z = (i + seed) * 0x9e3779b97f4a7c15ull;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    const float u = static_cast<float>((z ^ z >> 31) >> 40) * 0x1p-24f;
    x[i].bits = static_cast<std::uint16_t>(pack_bf16((2 * u - 1) * scale, 0.0f));
  }
}

struct Experts {
  int experts, width, neurons, choices, tokens, rows;
  std::vector<int> offsets;
  Memory<int> token, offsets_e1, ranking;
  Memory<float> weight;
  Memory<bf16> x, dout, gate_up_weights, down_weights;

  // Rows of each expert; row r is of a token at random.
  Experts(const std::vector<int>& rows_of_expert, int width_, int neurons_, int choices_, std::uint64_t seed)
      : experts(static_cast<int>(rows_of_expert.size())),
        width(width_),
        neurons(neurons_),
        choices(choices_),
        tokens(0),
        rows(0),
        offsets(offsets_of(rows_of_expert)),
        token(token_of(offsets.back(), choices, seed)),
        offsets_e1(offsets),
        ranking(ranking_of(rows_of_expert)),
        weight(weights_of(offsets.back(), seed)),
        x(static_cast<std::size_t>(tokens_of(offsets.back(), choices)) * width),
        dout(x.size()),
        gate_up_weights(std::size_t{2} * experts * neurons * width),
        down_weights(static_cast<std::size_t>(experts) * neurons * width) {
    rows = offsets.back();
    tokens = tokens_of(rows, choices);
    const float scale = 1.7f / std::sqrt(static_cast<float>(width));
    random(x, seed + 1, 1.0f);
    random(dout, seed + 2, 1.0f);
    random(gate_up_weights, seed + 3, scale);
    random(down_weights, seed + 4, scale);
  }
  Routing routing() const { return {token.data(), offsets_e1.data(), experts}; }
  static void random(Memory<bf16>& to, std::uint64_t seed, float scale) {
    fill_random<<<1024, 256>>>(to.data(), to.size(), seed << 32, scale);
    CHECK_GPU(cudaGetLastError());
  }

 private:
  static int tokens_of(int rows, int choices) { return rows / choices + 1; }
  static std::vector<int> offsets_of(const std::vector<int>& rows) {
    std::vector<int> to{0};
    for (int r : rows) to.push_back(to.back() + r);
    return to;
  }
  static std::vector<int> token_of(int rows, int choices, std::uint64_t seed) {
    std::mt19937_64 random(seed);
    std::vector<int> to(static_cast<std::size_t>(rows) + 1);
    for (int& r : to) r = static_cast<int>(random() % static_cast<unsigned>(tokens_of(rows, choices)));
    return to;
  }
  static std::vector<int> ranking_of(const std::vector<int>& rows) {
    std::vector<int> to(rows.size());
    for (std::size_t i = 0; i < to.size(); ++i) to[i] = static_cast<int>(i);
    std::stable_sort(to.begin(), to.end(), [&](int a, int b) { return rows[a] > rows[b]; });
    return to;
  }
  static std::vector<float> weights_of(int rows, std::uint64_t seed) {
    std::mt19937_64 random(seed + 9);
    std::vector<float> to(static_cast<std::size_t>(rows) + 1);
    for (float& w : to) w = 0.05f + static_cast<float>(random() % 1000) * 0.0005f;
    return to;
  }
};

template <class C>
void experts_up(const Experts& e, bf16* gate_up, bf16* hidden) {
  const TensorMap w = up_weights_map<C>(e.gate_up_weights.data(), e.experts, e.neurons, e.width);
  launch(experts_up_kernel<C>, multiprocessors() / C::kBlocks * C::kBlocks, kBlockThreads,
         sizeof(UpShared<C>), C::kBlocks, w,
         UpProduct{e.x.data(), e.weight.data(), gate_up, hidden, e.routing(), e.width, e.neurons});
}
// y = hidden w_down^T, or dx = dgate_up w_gate_up.
template <class C>
void experts_rows(const Experts& e, bf16* y, const bf16* in) {
  constexpr bool kForward = C::kWeights == Major::kK;
  const int inner = kForward ? e.neurons : 2 * e.neurons;
  const TensorMap x = rows_map(in, e.rows, inner);
  const TensorMap w = rows_weights_map<C>(kForward ? e.down_weights.data() : e.gate_up_weights.data(),
                                          e.experts, e.width, inner);
  launch(experts_rows_kernel<C>, multiprocessors() / C::kBlocks * C::kBlocks, kBlockThreads,
         sizeof(RowsShared<C>), C::kBlocks, x, w,
         RowsProduct{y, e.offsets_e1.data(), e.experts, inner, e.width});
}
template <class C>
void experts_dhidden(const Experts& e, bf16* dgate_up, bf16* hidden, float* dweight, const bf16* gate_up) {
  const TensorMap w = dhidden_weights_map(e.down_weights.data(), e.experts, e.neurons, e.width);
  launch(experts_dhidden_kernel<C>, multiprocessors() / C::kBlocks * C::kBlocks, kBlockThreads,
         sizeof(DHiddenShared<C>), C::kBlocks, w,
         DHiddenProduct{e.dout.data(), gate_up, e.weight.data(), dgate_up, hidden, dweight, e.routing(),
                        e.width, e.neurons});
}
// Of w_gate_up from dgate_up, or (transposed) of w_down from weight * hidden.
template <class C>
void experts_dweights(const Experts& e, bf16* dw, const bf16* y) {
  const int columns = C::kTransposed ? e.neurons : 2 * e.neurons;
  const TensorMap map = gradient_rows_map(y, e.rows, columns);
  launch(experts_dweights_kernel<C>, multiprocessors() / C::kBlocks * C::kBlocks, kBlockThreads,
         sizeof(DWeightsShared<C>), C::kBlocks, map,
         WeightsGradient{C::kTransposed ? e.dout.data() : e.x.data(), dw, e.ranking.data(), e.routing(),
                         columns, e.width});
}

}  // namespace sm90_bench
