#pragma once
// The experts' first product with what stands before and behind it: rows gathered, gates and ups multiplied,
// SwiGLU. Writes gate_up (for backward) and hidden = weight * SwiGLU(gate_up), the operand of the second product.
//
// Tiles of 128 rows x 256 columns, 128 neurons' gates and ups. Weights [E, F, 2, D] come in blocks of eight gates
// and eight ups through a map of five dimensions, so that a thread's sums hold both of two neighbouring neurons.

#include "kernels/cuda/sm90/expert_pipeline.cuh"

namespace upmoe::cuda::sm90 {

struct UpProduct {
  const bf16* x_TD;
  const float* weight_R;
  bf16 *gate_up_RG, *hidden_RF;
  Routing routing;
  int width, neurons;  // D, a multiple of 64; F, a multiple of 128
};

template <int kBlocks_, int kStages_, TileOrder kOrder_ = TileOrder::kRows, int kLag_ = 0>
struct UpConfig {
  static constexpr TileOrder kOrder = kOrder_;
  static constexpr int kLag = kLag_;
  static constexpr int kBlocks = kBlocks_, kStages = kStages_;
  static constexpr int kColumns = 256, kNeurons = kColumns / 2, kWeightBlocks = kColumns / 16;
};
template <class C>
using UpShared = Stages<C::kStages, kTileRows * kRowBytes, C::kColumns * kRowBytes, kWarpStagingBytes,
                        RowTileTable<C::kOrder>>;

// Of w [E, F, 2, D].
template <class C>
TensorMap up_weights_map(const bf16* w, std::int64_t experts, std::int64_t neurons, std::int64_t width) {
  return make_tensor_map(w, {width, 8, 2, neurons / 8, experts},
                         {4 * width, 2 * width, 32 * width, 4 * neurons * width},
                         {kStepK, 8, 2, C::kWeightBlocks / C::kBlocks, 1});
}

// One thread: this block's part of the weights for both, or all of its own.
template <class C>
__device__ void load_up_weights(UpShared<C>& s, u32 stage, const TensorMap& w, const RowTile& tile, int k) {
  constexpr int kPart = C::kWeightBlocks / C::kBlocks, kPartBytes = UpShared<C>::kBBytes / C::kBlocks;
  const int rank = static_cast<int>(cluster_rank()), first = tile.column * C::kWeightBlocks;
  u64* full = &s.full[stage];
  mbarrier_arrive_expect_tx(full, UpShared<C>::kBBytes);
  if (C::kBlocks > 1 && tile.shared) {
    tma_load_multicast((1 << C::kBlocks) - 1, s.b[stage] + rank * kPartBytes, w, full, k, 0, 0,
                       first + rank * kPart, tile.expert);
    return;
  }
#pragma unroll
  for (int part = 0; part < C::kBlocks; ++part)
    tma_load(s.b[stage] + part * kPartBytes, w, full, k, 0, 0, first + part * kPart, tile.expert);
}

// Of 16 columns a thread has the gates (d[0..3]) and ups (d[4..7]) of neurons 2 * (lane % 4) and the next
// one, in rows lane / 4 and 8 more. This is for 32 neurons, or 64 columns.
__device__ inline void store_gate_up(const float* d, unsigned char* staging, unsigned char* first,
                                     u32 row_bytes, int rows) {
  const u32 lane = threadIdx.x % 32;
#pragma unroll
  for (u32 half = 0; half < 2; ++half)
#pragma unroll
    for (u32 block = 0; block < 4; ++block) {
      const u32 j = 8 * block + 2 * half;
      const uint2 both{pack_bf16(d[j], d[j + 4]), pack_bf16(d[j + 1], d[j + 5])};
      unsigned char* row = staging + staged<8>(lane / 4, 2 * block + lane % 4 / 2);
      store_shared(row + lane % 2 * 8 + half * kEightRows, both);
    }
  __syncwarp();
  store_lines<8>(staging, first, row_bytes, rows);
  __syncwarp();
}

// For 64 neurons.
__device__ inline void store_hidden(const float* d, const float (&weight)[2], unsigned char* staging,
                                    unsigned char* first, u32 row_bytes, int rows) {
  const auto hidden = [&](int j, int half) {
    const int i = j + 2 * half;
    return pack_bf16(d[i] * sigmoid(d[i]) * d[i + 4] * weight[half],
                     d[i + 1] * sigmoid(d[i + 1]) * d[i + 5] * weight[half]);
  };
#pragma unroll
  for (int chunk = 0; chunk < 8; chunk += 2) {
    const int j = 8 * chunk;
    stmatrix_x4(fragment_row(staging, static_cast<u32>(chunk)), hidden(j, 0), hidden(j, 1), hidden(j + 8, 0),
                hidden(j + 8, 1));
  }
  __syncwarp();
  store_lines<4>(staging, first, row_bytes, rows);
  __syncwarp();
}

template <class C>
__device__ void store_up_tile(const float (&d)[128], UpShared<C>& s, const RowTile& tile,
                              const UpProduct& p) {
  const int first = group_of_thread() * 64 + warp_of_group() * 16, rows = tile.rows - first;
  const std::int64_t row = tile.first_row + first, neuron = tile.column * C::kNeurons;
  unsigned char* staging = s.warp_staging();
  float weight[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = lane_of_thread() / 4 + 8 * half;
    weight[half] = r < rows ? load_global<float>(p.weight_R + (row + r)) : 0.0f;
  }
  auto* gate_up = reinterpret_cast<unsigned char*>(p.gate_up_RG + (row * p.neurons + neuron) * 2);
  auto* hidden = reinterpret_cast<unsigned char*>(p.hidden_RF + row * p.neurons + neuron);
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // of 64 neurons, done with before the next ones: registers
#pragma unroll
    for (int part = 0; part < 2; ++part)
      store_gate_up(d + 64 * half + 32 * part, staging, gate_up + (2 * half + part) * kRowBytes,
                    4 * static_cast<u32>(p.neurons), rows);
    store_hidden(d + 64 * half, weight, staging, hidden + half * kRowBytes, 2 * static_cast<u32>(p.neurons),
                 rows);
  }
}

template <class C>
__device__ void multiply_up(UpShared<C>& s, const UpProduct& p) {
  const int rank = static_cast<int>(cluster_rank());
  StageCounter<C::kStages> at;
  RowTile tile;
  for (int unit = static_cast<int>(blockIdx.x) / C::kBlocks; s.tiles.find(tile, unit, C::kBlocks, rank);
       unit += static_cast<int>(gridDim.x) / C::kBlocks) {
    if (tile.rows <= group_of_thread() * 64) {
      pass_stages<C::kBlocks>(s, at, p.width / kStepK);
      continue;
    }
    float d[128];
    multiply_64x256<Major::kK, Major::kK, C::kLag == 0, C::kBlocks>(d, s, at, p.width / kStepK);
    store_up_tile<C>(d, s, tile, p);
  }
}

template <class C>
__global__ void __launch_bounds__(kBlockThreads, 1)
    experts_up_kernel(const __grid_constant__ TensorMap w, const __grid_constant__ UpProduct p) {
  auto& s = dynamic_shared<UpShared<C>>();
  if (threadIdx.x == 0) {
    s.init(1 + kGroupThreads, kConsumers * 4 * C::kBlocks);
    fence_mbarrier_init();
  }
  s.tiles.fill(p.routing.offsets, p.routing.experts, p.neurons / C::kNeurons, C::kBlocks);
  take_roles<56, 224>(
      [&] {
        bring_gathered<C::kBlocks, C::kLag>(
            s, s.tiles, p.x_TD, p.width, p.routing,
            [&](const RowTile& tile, u32 stage, int k) { load_up_weights<C>(s, stage, w, tile, k); });
      },
      [&] { multiply_up<C>(s, p); });
}

}  // namespace upmoe::cuda::sm90
