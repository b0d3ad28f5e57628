#pragma once
// Products of rows that already lie expert by expert: y = hidden w_down^T (forward), dx = dgate_up w_gate_up
// (backward). Tiles of 128 rows x 256 columns; both operands come by the copy engine. The last rows of an
// expert's last tile are the next expert's, or zeros behind the last: they are multiplied and never stored.

#include "kernels/cuda/sm90/expert_pipeline.cuh"

namespace upmoe::cuda::sm90 {

struct RowsProduct {
  bf16* y_RN;
  const int* offsets;  // [E + 1]
  int experts;
  int inner, columns;  // of the summed dimension, a multiple of 64; N, a multiple of 256
};

// kWeights: kK where weights are [E, N, inner] (forward), kMN where they are [E, inner, N] (backward).
template <Major kWeights_, int kBlocks_, int kStages_, TileOrder kOrder_ = TileOrder::kRows>
struct RowsConfig {
  static constexpr TileOrder kOrder = kOrder_;
  static constexpr Major kWeights = kWeights_;
  static constexpr int kBlocks = kBlocks_, kStages = kStages_, kColumns = 256,
                       kPanels = kColumns / kRowElements;
};
template <class C>
using RowsShared = Stages<C::kStages, kTileRows * kRowBytes, C::kColumns * kRowBytes, kWarpStagingBytes,
                          RowTileTable<C::kOrder>>;

// Of x [R, inner].
inline TensorMap rows_map(const bf16* x, std::int64_t rows, std::int64_t inner) {
  return make_tensor_map(x, {inner, rows}, {2 * inner}, {kStepK, kTileRows});
}
// Of w, [E, columns, inner] or [E, inner, columns].
template <class C>
TensorMap rows_weights_map(const bf16* w, std::int64_t experts, std::int64_t columns, std::int64_t inner) {
  if constexpr (C::kWeights == Major::kK)
    return make_tensor_map(w, {inner, columns, experts}, {2 * inner, 2 * inner * columns},
                           {kStepK, C::kColumns / C::kBlocks, 1});
  else
    return make_tensor_map(w, {columns, inner, experts}, {2 * columns, 2 * inner * columns},
                           {kRowElements, kStepK, 1});
}

// Boxes of weights: one of 256 / kBlocks rows of the summed dimension, or one for each 64 columns.
template <class C, bool kShare>
__device__ void load_rows_weights(RowsShared<C>& s, u32 stage, const TensorMap& w, const RowTile& tile,
                                  int k) {
  constexpr int kBoxes = C::kWeights == Major::kK ? C::kBlocks : C::kPanels;
  constexpr int kBoxBytes = RowsShared<C>::kBBytes / kBoxes, kBoxColumns = C::kColumns / kBoxes;
  const int rank = static_cast<int>(cluster_rank());
#pragma unroll
  for (int i = 0; i < kBoxes / (kShare ? C::kBlocks : 1); ++i) {
    const int box = kShare ? rank * (kBoxes / C::kBlocks) + i : i,
              column = tile.column * C::kColumns + box * kBoxColumns;
    unsigned char* to = s.b[stage] + box * kBoxBytes;
    const int x = C::kWeights == Major::kK ? k : column, y = C::kWeights == Major::kK ? column : k;
    if constexpr (kShare)
      tma_load_multicast((1 << C::kBlocks) - 1, to, w, &s.full[stage], x, y, tile.expert);
    else
      tma_load(to, w, &s.full[stage], x, y, tile.expert);
  }
}

// By one thread.
template <class C>
__device__ void bring_rows_operands(RowsShared<C>& s, const TensorMap& x, const TensorMap& w,
                                    const RowsProduct& p) {
  const int rank = static_cast<int>(cluster_rank());
  StageCounter<C::kStages> at;
  RowTile tile;
  for (int unit = static_cast<int>(blockIdx.x) / C::kBlocks; s.tiles.find(tile, unit, C::kBlocks, rank);
       unit += static_cast<int>(gridDim.x) / C::kBlocks)
    for (int k = 0; k < p.inner; k += kStepK, at.next()) {
      mbarrier_wait(&s.empty[at.stage], at.parity ^ 1);
      mbarrier_arrive_expect_tx(&s.full[at.stage], RowsShared<C>::kABytes + RowsShared<C>::kBBytes);
      tma_load(s.a[at.stage], x, &s.full[at.stage], k, tile.first_row);
      if (C::kBlocks > 1 && tile.shared)
        load_rows_weights<C, true>(s, at.stage, w, tile, k);
      else
        load_rows_weights<C, false>(s, at.stage, w, tile, k);
    }
}

template <class C>
__device__ void multiply_rows(RowsShared<C>& s, const RowsProduct& p) {
  const int rank = static_cast<int>(cluster_rank());
  StageCounter<C::kStages> at;
  RowTile tile;
  for (int unit = static_cast<int>(blockIdx.x) / C::kBlocks; s.tiles.find(tile, unit, C::kBlocks, rank);
       unit += static_cast<int>(gridDim.x) / C::kBlocks) {
    const int group_row = group_of_thread() * 64;
    if (tile.rows <= group_row) {
      pass_stages<C::kBlocks>(s, at, p.inner / kStepK);
      continue;
    }
    float d[128];
    multiply_64x256<Major::kK, C::kWeights, false, C::kBlocks>(d, s, at, p.inner / kStepK);
    const int first = group_row + warp_of_group() * 16;
    bf16* y =
        p.y_RN + static_cast<std::int64_t>(tile.first_row + first) * p.columns + tile.column * C::kColumns;
    store_sums<false>(d, s.warp_staging(), reinterpret_cast<unsigned char*>(y),
                      2 * static_cast<u32>(p.columns), tile.rows - first);
  }
}

template <class C>
__global__ void __launch_bounds__(kBlockThreads, 1)
    experts_rows_kernel(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w,
                        const __grid_constant__ RowsProduct p) {
  auto& s = dynamic_shared<RowsShared<C>>();
  if (threadIdx.x == 0) {
    s.init(1, kConsumers * 4 * C::kBlocks);
    fence_mbarrier_init();
  }
  s.tiles.fill(p.offsets, p.experts, p.columns / C::kColumns, C::kBlocks);
  // take_roles() in words of its own: where one thread brings all, ptxas makes other code of that.
  cluster_sync();  // the other block's barriers are there
  if (group_of_thread() == kConsumers) {
    setmaxnreg_dec<40>();
    if (threadIdx.x % kGroupThreads == 0) bring_rows_operands<C>(s, x, w, p);
  } else {
    setmaxnreg_inc<232>();
    multiply_rows<C>(s, p);
  }
  cluster_sync();  // nobody writes any more to a block that leaves
}

}  // namespace upmoe::cuda::sm90
