#pragma once
// Backward of the second product and of SwiGLU: dhidden = dout[tokens] w_down stays in registers; written are
// dgate_up, weight * hidden (the operand of w_down's gradient), and of every row the part of the weight's
// gradient that these 128 neurons give: <dhidden, SwiGLU(gate_up)>, to be summed over the column tiles in order.
//
// So much stands behind the product that two warpgroups take turns, each with tiles of its own of 128 rows x
// 128 neurons: one multiplies while the other one finishes.

#include "kernels/cuda/sm90/expert_pipeline.cuh"

namespace upmoe::cuda::sm90 {

struct DHiddenProduct {
  const bf16 *dout_TD, *gate_up_RG;
  const float* weight_R;
  bf16 *dgate_up_RG, *hidden_RF;
  float* dweight_RP;  // [R, F / 128]
  Routing routing;
  int width, neurons;  // D, a multiple of 64; F, a multiple of 128
};

template <int kBlocks_, int kStages_, TileOrder kOrder_ = TileOrder::kRows, int kLag_ = 0>
struct DHiddenConfig {
  static constexpr TileOrder kOrder = kOrder_;
  static constexpr int kLag = kLag_;
  static constexpr int kBlocks = kBlocks_, kStages = kStages_, kNeurons = 128, kPanels = 2;
};
template <TileOrder kOrder>
struct TurnTable : RowTileTable<kOrder> {
  u64 turn[kConsumers];  // barriers: the tensor cores are that group's
};
template <class C>
using DHiddenShared = Stages<C::kStages, kTileRows * kRowBytes, C::kNeurons * kRowBytes,
                             4 * kWarpStagingBytes, TurnTable<C::kOrder>>;

// Of w_down [E, D, F].
inline TensorMap dhidden_weights_map(const bf16* w, std::int64_t experts, std::int64_t neurons,
                                     std::int64_t width) {
  return make_tensor_map(w, {neurons, width, experts}, {2 * neurons, 2 * neurons * width},
                         {kRowElements, kStepK, 1});
}

// By one thread. Weights are [E, D, F]: the summed D is their slow dimension.
template <class C>
__device__ void load_dhidden_weights(DHiddenShared<C>& s, u32 stage, const TensorMap& w, const RowTile& tile,
                                     int k) {
  u64* full = &s.full[stage];
  mbarrier_arrive_expect_tx(full, DHiddenShared<C>::kBBytes);
  const int first = tile.column * C::kNeurons, rank = static_cast<int>(cluster_rank());
  if (C::kBlocks > 1 && tile.shared) {
    tma_load_multicast((1 << C::kBlocks) - 1, s.b[stage] + rank * kPanelBytes, w, full,
                       first + rank * kRowElements, k, tile.expert);
    return;
  }
#pragma unroll
  for (int panel = 0; panel < C::kPanels; ++panel)
    tma_load(s.b[stage] + panel * kPanelBytes, w, full, first + panel * kRowElements, k, tile.expert);
}

// One neuron of one row.
struct SwigluBackward {
  float dgate, dup, hidden, dweight;
  __device__ SwigluBackward(float dhidden, float gate, float up, float weight) {
    const float s = sigmoid(gate), silu = gate * s, d = dhidden * weight;
    dgate = d * up * (s + silu * (1.0f - s));
    dup = d * silu;
    hidden = silu * up * weight;
    dweight = dhidden * silu * up;
  }
};

// The sum, added up by where this stands. ptxas puts additions off to where their sum is needed, and would hold the
// terms of a whole tile in registers that long; it moves no shuffle.
__device__ inline float summed_here(float sum) {
  return __shfl_sync(0xffffffffu, sum, lane_of_thread());
}

// 32 neurons of a warp's 16 rows: gate_up stands in `gates` and gives way to its gradient; hidden's chunks come into
// `hidden` from `chunk` on. Of eight rows all is read before any of it is written: the compiler cannot know that places
// differ. Places of chunks differ by an exclusive or, as the swizzles do.
__device__ inline void finish_neurons(const float* d, unsigned char* gates, unsigned char* hidden, u32 chunk,
                                      const float (&weight)[2], float (&dweight)[2]) {
  const u32 lane = threadIdx.x % 32;
  const u32 pair = staged<8>(lane / 4, lane % 4 / 2) + lane % 2 * 8,
            word = staged<4>(lane / 4, 0) + lane % 4 * 4;
  const auto place = [&](u32 i) { return gates + (pair ^ i * 32); };
#pragma unroll
  for (u32 half = 0; half < 2; ++half) {
    uint2 h[4];
    u32 out[4];
#pragma unroll
    for (u32 i = 0; i < 4; ++i) h[i] = load_shared<uint2>(place(i) + half * kEightRows);
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
      const u32 j = 4 * i + 2 * half;
      const SwigluBackward first(d[j], low_of(h[i].x), high_of(h[i].x), weight[half]),
          second(d[j + 1], low_of(h[i].y), high_of(h[i].y), weight[half]);
      h[i] = uint2{pack_bf16(first.dgate, first.dup), pack_bf16(second.dgate, second.dup)};
      out[i] = pack_bf16(first.hidden, second.hidden);
      dweight[half] += first.dweight + second.dweight;
    }
    dweight[half] = summed_here(dweight[half]);
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
      store_shared(place(i) + half * kEightRows, h[i]);
      store_shared(hidden + (word ^ (chunk + i) * 16) + half * kEightRows, out[i]);
    }
  }
}

// What stands behind a tile's product, for one warp: 16 rows of its upper half, then 16 of the lower one, each
// in four parts of 32 neurons. Parts' gate_up is fetched three ahead, the first ones during the product already.
template <class C>
class Finish {
 public:
  __device__ Finish(unsigned char* staging, const RowTile& tile, const DHiddenProduct& p)
      : staging_(staging), tile_(tile), p_(p), first_(warp_of_group() * 16) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = first_ + i / 2 * 64 + i % 2 * 8 + lane_of_thread() / 4;
      weight_[i] = row < tile.rows ? load_global<float>(p.weight_R + tile.first_row + row) : 0.0f;
    }
#pragma unroll
    for (int part = 0; part < kFetched; ++part) fetch(part);
  }
  // kHalf 0, then 1: the sums of rows 64 * kHalf on.
  template <int kHalf>
  __device__ void rows(const float (&d)[64]) {
    const int first = first_ + 64 * kHalf, rows = tile_.rows - first;
    const float weight[2] = {weight_[2 * kHalf], weight_[2 * kHalf + 1]};
    float dweight[2] = {0.0f, 0.0f};
    unsigned char* hidden = staging_ + kFetched * kWarpStagingBytes;
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      unsigned char* gates = buffer(4 * kHalf + part);
      cp_async_wait<kFetched - 1>();
      __syncwarp();
      finish_neurons(d + 16 * part, gates, hidden, static_cast<u32>(part % 2 * 4), weight, dweight);
      __syncwarp();
      store_lines<8>(gates, reinterpret_cast<unsigned char*>(p_.dgate_up_RG) + place(first, part) * 4,
                     4 * static_cast<u32>(p_.neurons), rows);
      if (part % 2 == 1)
        store_lines<4>(hidden, reinterpret_cast<unsigned char*>(p_.hidden_RF) + place(first, part - 1) * 2,
                       2 * static_cast<u32>(p_.neurons), rows);
      __syncwarp();
      fetch(4 * kHalf + part + kFetched);
    }
    store_dweight(dweight, first, rows);
  }

 private:
  static constexpr int kFetched = 3;
  __device__ unsigned char* buffer(int part) const {
    return staging_ + part % kFetched * kWarpStagingBytes;
  }
  __device__ std::int64_t place(int row, int part) const {  // of a neuron in [R, F]
    return static_cast<std::int64_t>(tile_.first_row + row) * p_.neurons + tile_.column * C::kNeurons +
           part * 32;
  }
  __device__ void fetch(int part) {
    if (part < 8) {
      const int first = first_ + part / 4 * 64;
      const u32 lane = threadIdx.x % 32;
      const bf16* from = p_.gate_up_RG + place(first, part % 4) * 2 + lane % 8 * 8;
      unsigned char* to = buffer(part);
#pragma unroll
      for (u32 i = 0; i < 4; ++i) {
        const u32 row = 4 * i + lane / 8;
        const bool there = first + static_cast<int>(row) < tile_.rows;
        cp_async_16(to + staged<8>(row, lane % 8),
                    there ? from + row * 2 * static_cast<u32>(p_.neurons) : p_.gate_up_RG, there);
      }
    }
    cp_async_commit();
  }
  __device__ void store_dweight(const float (&dweight)[2], int first, int rows) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // the four lanes of a row
      float sum = dweight[half];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      const int r = lane_of_thread() / 4 + 8 * half;
      if (r < rows && lane_of_thread() % 4 == 0)
        store_global(p_.dweight_RP +
                         static_cast<std::int64_t>(tile_.first_row + first + r) * (p_.neurons / C::kNeurons) +
                         tile_.column,
                     sum);
    }
  }

  unsigned char* staging_;
  const RowTile& tile_;
  const DHiddenProduct& p_;
  int first_;
  float weight_[4];
};

template <class C>
__device__ void multiply_dhidden(DHiddenShared<C>& s, const DHiddenProduct& p) {
  const int group = group_of_thread(), steps = p.width / kStepK;
  const int rank = static_cast<int>(cluster_rank()), blocks = static_cast<int>(gridDim.x);
  StageCounter<C::kStages> at;
  at.skip(static_cast<u32>(group * steps));
  u32 turns = 0;
  RowTile tile;
  for (int unit = static_cast<int>(blockIdx.x) / C::kBlocks + group * (blocks / C::kBlocks);
       s.tiles.find(tile, unit, C::kBlocks, rank);
       unit += kConsumers * blocks / C::kBlocks, at.skip(static_cast<u32>(steps))) {
    float top[64], bottom[64];
    mbarrier_wait(&s.tiles.turn[group], turns++ & 1);
    Finish<C> finish(s.warp_staging(), tile, p);
    multiply_128x128<Major::kK, C::kLag == 0, C::kBlocks>(
        top, bottom, s, at, steps, [&](u32 stage) { return s.a[stage]; },
        [&](u32 stage) { return s.b[stage]; },
        [&] {  // the other group may begin
          if (threadIdx.x % 32 == 0) mbarrier_arrive(&s.tiles.turn[1 - group]);
        });
    finish.template rows<0>(top);
    finish.template rows<1>(bottom);
  }
}

template <class C>
__global__ void __launch_bounds__(kBlockThreads, 1)
    experts_dhidden_kernel(const __grid_constant__ TensorMap w, const __grid_constant__ DHiddenProduct p) {
  auto& s = dynamic_shared<DHiddenShared<C>>();
  if (threadIdx.x == 0) {
    s.init(1 + kGroupThreads, 4 * C::kBlocks);
    for (u64& turn : s.tiles.turn) mbarrier_init(&turn, 4);
    fence_mbarrier_init();
    for (int warp = 0; warp < 4; ++warp) mbarrier_arrive(&s.tiles.turn[0]);  // the first group begins
  }
  s.tiles.fill(p.routing.offsets, p.routing.experts, p.neurons / C::kNeurons, C::kBlocks);
  take_roles<56, 224>(
      [&] {
        bring_gathered<C::kBlocks, C::kLag>(
            s, s.tiles, p.dout_TD, p.width, p.routing,
            [&](const RowTile& tile, u32 stage, int k) { load_dhidden_weights<C>(s, stage, w, tile, k); });
      },
      [&] { multiply_dhidden<C>(s, p); });
}

}  // namespace upmoe::cuda::sm90
