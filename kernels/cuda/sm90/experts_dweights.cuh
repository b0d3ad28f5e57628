#pragma once
// Gradients of the experts' weights: dw[e] (+)= y[rows of e]^T x[their tokens]. What is summed over are the
// expert's rows, the slow dimension of both operands. y is dgate_up, or weight * hidden; x the tokens'
// activations, or their output gradients, gathered. Tiles of 128 columns of y x 256 of x; experts in the
// order of `ranking`, the longest first, since that expert's tiles take longest.
//
// Of x the rows behind the expert's last one are zero. Those of y are the next expert's, finite unless
// training is lost already, and zeros behind the last.

#include "kernels/cuda/sm90/expert_pipeline.cuh"

namespace upmoe::cuda::sm90 {

struct WeightsGradient {
  const bf16* x_TX;
  bf16* dw;  // [E, Y, X], or [E, X, Y] where transposed
  const int* ranking;
  Routing routing;
  int columns_y, columns_x;  // multiples of 128 and, for each block of a cluster, of 256
};

template <bool kTransposed_, bool kAdd_, int kBlocks_, int kStages_, TileOrder kOrder_ = TileOrder::kRows,
          int kLag_ = 0>
struct DWeightsConfig {
  static constexpr TileOrder kOrder = kOrder_;
  static constexpr int kLag = kLag_;
  static constexpr bool kTransposed = kTransposed_, kAdd = kAdd_;  // kAdd: to what dw holds
  static constexpr int kBlocks = kBlocks_, kStages = kStages_, kRowsY = 128, kColumnsX = 256;
  static constexpr int kPanelsY = kRowsY / kRowElements, kPanelsX = kColumnsX / kRowElements;
};
struct GradientTile {
  int expert, y, x;  // in tiles
  int first_row, rows;
};
// The experts' rows in shared memory. Tiles in order: experts by `ranking`, columns of x, columns of y, or these two
// the other way (TileOrder); a cluster's two blocks have neighbouring columns of x and share y.
template <TileOrder kOrder>
struct GradientTable {
  int experts, tiles_y, tiles_x;
  int first_row[kMostExperts], rows[kMostExperts], ranking[kMostExperts];

  __device__ void fill(const Routing& routing, const int* experts_by_rows, int tiles_y_, int tiles_x_) {
    if (threadIdx.x == 0) {
      experts = routing.experts;
      tiles_y = tiles_y_;
      tiles_x = tiles_x_;
    }
    for (int i = static_cast<int>(threadIdx.x); i < routing.experts; i += static_cast<int>(blockDim.x)) {
      const int e = experts_by_rows[i];
      ranking[i] = e;
      first_row[i] = routing.offsets[e];
      rows[i] = routing.offsets[e + 1] - first_row[i];
    }
  }
  __device__ bool find(GradientTile& tile, int unit, int blocks, int rank) const {
    const int groups = tiles_x / blocks, each = tiles_y * groups;
    if (unit >= experts * each) return false;
    const int i = unit / each, within = unit % each;
    constexpr bool kByRows = kOrder == TileOrder::kRows;
    const int y = kByRows ? within % tiles_y : within / groups,
              x = kByRows ? within / tiles_y : within % groups;
    tile = {ranking[i], y, x * blocks + rank, first_row[i], rows[i]};
    return true;
  }
};

template <class C>
using DWeightsShared = Stages<C::kStages, C::kPanelsY * kPanelBytes, C::kPanelsX * kPanelBytes,
                              kWarpStagingBytes, GradientTable<C::kOrder>>;

// Of y [R, Y].
inline TensorMap gradient_rows_map(const bf16* y, std::int64_t rows, std::int64_t columns) {
  return make_tensor_map(y, {columns, rows}, {2 * columns}, {kRowElements, kStepK});
}

// 64 gathered rows, 256 elements wide: a warp copies every fourth row, 512 bytes at once. Which rows come
// next its first 16 lanes find one stage ahead, as offsets in units of 16 bytes.
class GatheredPanels {
 public:
  __device__ void find(const Routing& routing, const GradientTile& tile, int k) {
    const int lane = lane_of_thread(), row = k + warp_of_group() + 4 * lane;
    token_ = lane < 16 && row < tile.rows ? load_global<int>(routing.token_R + (tile.first_row + row)) : -1;
  }
  __device__ void begin(int width) {
    offset_ = token_ < 0 ? kNone : static_cast<u32>(token_) * static_cast<u32>(width / 8);
  }
  __device__ void copy(unsigned char* panels, const bf16* column) const {
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    unsigned char* panel = panels + lane / 8 * kPanelBytes;
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
      // Rows warp + 4 * half and every eighth one on, in the same place of a line.
      unsigned char* to = panel + swizzled(warp + 4 * half, lane % 8);
      u32 offset[8];
#pragma unroll
      for (u32 i = 0; i < 8; ++i)
        offset[i] = __shfl_sync(0xffffffffu, offset_, static_cast<int>(2 * i + half));
#pragma unroll
      for (u32 i = 0; i < 8; ++i)
        cp_async_16(to + i * 8 * kRowBytes, column + std::size_t{offset[i]} * 8, offset[i] != kNone);
    }
  }

 private:
  static constexpr u32 kNone = 0xffffffffu;
  int token_ = -1;
  u32 offset_ = kNone;
};

// By one thread: this block's panel of y for both, or all of them.
template <class C>
__device__ void load_gradient_rows(DWeightsShared<C>& s, u32 stage, const TensorMap& y,
                                   const GradientTile& tile, int k) {
  u64* full = &s.full[stage];
  mbarrier_arrive_expect_tx(full, DWeightsShared<C>::kABytes);
  const int column = tile.y * C::kRowsY, row = tile.first_row + k;
  if constexpr (C::kBlocks == 2) {
    const int panel = static_cast<int>(cluster_rank());
    tma_load_multicast(3, s.a[stage] + panel * kPanelBytes, y, full, column + panel * kRowElements, row);
  } else {
#pragma unroll
    for (int panel = 0; panel < C::kPanelsY; ++panel)
      tma_load(s.a[stage] + panel * kPanelBytes, y, full, column + panel * kRowElements, row);
  }
}

template <class C>
__device__ void bring_gradient_operands(DWeightsShared<C>& s, const TensorMap& y, const WeightsGradient& p) {
  const int rank = static_cast<int>(cluster_rank()), stride = static_cast<int>(gridDim.x) / C::kBlocks;
  int unit = static_cast<int>(blockIdx.x) / C::kBlocks;
  StageCounter<C::kStages> at;
  Arrivals<C::kLag> arrivals;
  GatheredPanels gathered;
  GradientTile tile, next;
  bool more = s.tiles.find(tile, unit, C::kBlocks, rank);
  if (more) gathered.find(p.routing, tile, 0);
  while (more) {
    unit += stride;
    more = s.tiles.find(next, unit, C::kBlocks, rank);
    const bf16* column = p.x_TX + tile.x * C::kColumnsX + lane_of_thread() * 8;
#pragma unroll 1  // registers
    for (int k = 0; k < tile.rows; k += kStepK, at.next()) {
      gathered.begin(p.columns_x);
      if (k + kStepK < tile.rows)
        gathered.find(p.routing, tile, k + kStepK);
      else if (more)
        gathered.find(p.routing, next, 0);
      mbarrier_wait(&s.empty[at.stage], at.parity ^ 1);
      if (threadIdx.x % kGroupThreads == 0) load_gradient_rows<C>(s, at.stage, y, tile, k);
      gathered.copy(s.b[at.stage], column);
      arrivals.copied(s, at.stage);
    }
    if (tile.rows == 0 && more) gathered.find(p.routing, next, 0);
    tile = next;
  }
  arrivals.finish(s, at.stage);
}

// This warp's 16 rows of dw from `row` of the expert on, 64 columns for every 32 sums from `column` on.
template <bool kAdd, int kSums>
__device__ inline void store_gradient(const float (&d)[kSums], unsigned char* staging,
                                      const WeightsGradient& p, std::int64_t expert, int columns, int row,
                                      int column) {
  bf16* first = p.dw + expert * p.columns_y * p.columns_x + static_cast<std::int64_t>(row) * columns + column;
  store_sums<kAdd>(d, staging, reinterpret_cast<unsigned char*>(first), 2 * static_cast<u32>(columns), 16);
}
template <int kSums>
__device__ inline void clear(float (&d)[kSums]) {
#pragma unroll
  for (float& sum : d) sum = 0.0f;
}

// A tile of dw: rows are columns of y, this group's 64.
template <class C>
__device__ void multiply_by_y(DWeightsShared<C>& s, StageCounter<C::kStages>& at, const GradientTile& tile,
                              const WeightsGradient& p) {
  float d[128];
  multiply_64x256<Major::kMN, Major::kMN, C::kLag == 0, C::kBlocks>(d, s, at,
                                                                    (tile.rows + kStepK - 1) / kStepK);
  if (tile.rows == 0) clear(d);  // nothing was multiplied: the gradient is zero
  store_gradient<C::kAdd>(d, s.warp_staging(), p, tile.expert, p.columns_x,
                          tile.y * C::kRowsY + group_of_thread() * 64 + warp_of_group() * 16,
                          tile.x * C::kColumnsX);
}
// Where dw is transposed, its rows are columns of x, this group's 128.
template <class C>
__device__ void multiply_by_x(DWeightsShared<C>& s, StageCounter<C::kStages>& at, const GradientTile& tile,
                              const WeightsGradient& p) {
  const int group = group_of_thread();
  float top[64], bottom[64];
  multiply_128x128<Major::kMN, C::kLag == 0, C::kBlocks>(
      top, bottom, s, at, (tile.rows + kStepK - 1) / kStepK,
      [&](u32 stage) { return s.b[stage] + 2 * group * kPanelBytes; }, [&](u32 stage) { return s.a[stage]; },
      [] {});
  if (tile.rows == 0) {
    clear(top);
    clear(bottom);
  }
  const int row = tile.x * C::kColumnsX + group * 128 + warp_of_group() * 16;
  store_gradient<C::kAdd>(top, s.warp_staging(), p, tile.expert, p.columns_y, row, tile.y * C::kRowsY);
  store_gradient<C::kAdd>(bottom, s.warp_staging(), p, tile.expert, p.columns_y, row + 64,
                          tile.y * C::kRowsY);
}

template <class C>
__device__ void multiply_gradients(DWeightsShared<C>& s, const WeightsGradient& p) {
  const int rank = static_cast<int>(cluster_rank());
  StageCounter<C::kStages> at;
  GradientTile tile;
  for (int unit = static_cast<int>(blockIdx.x) / C::kBlocks; s.tiles.find(tile, unit, C::kBlocks, rank);
       unit += static_cast<int>(gridDim.x) / C::kBlocks) {
    if (tile.rows == 0 && C::kAdd) continue;
    if constexpr (C::kTransposed)
      multiply_by_x<C>(s, at, tile, p);
    else
      multiply_by_y<C>(s, at, tile, p);
  }
}

template <class C>
__global__ void __launch_bounds__(kBlockThreads, 1)
    experts_dweights_kernel(const __grid_constant__ TensorMap y, const __grid_constant__ WeightsGradient p) {
  auto& s = dynamic_shared<DWeightsShared<C>>();
  if (threadIdx.x == 0) {
    s.init(1 + kGroupThreads, kConsumers * 4 * C::kBlocks);
    fence_mbarrier_init();
  }
  s.tiles.fill(p.routing, p.ranking, p.columns_y / C::kRowsY, p.columns_x / C::kColumnsX);
  __syncthreads();
  take_roles<56, 224>([&] { bring_gradient_operands<C>(s, y, p); }, [&] { multiply_gradients<C>(s, p); });
}

}  // namespace upmoe::cuda::sm90
