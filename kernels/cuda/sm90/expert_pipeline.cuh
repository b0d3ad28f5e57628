#pragma once
// What the experts' kernels share. A block is three warpgroups: two that multiply and a third that brings
// operands into a ring of stages. Each stage has two barriers: `full` when its operands have arrived, `empty`
// when all who multiply, in all blocks that are written to from here, have read them.
//
// Weights and dense operands come by the copy engine, rows that the routing scatters over memory by cp.async
// of every thread of the third warpgroup: Hopper's copy engine cannot gather.

#include "kernels/core/bf16.h"
#include "kernels/cuda/sm90/expert_tiles.cuh"
#include "kernels/cuda/sm90/sm90.cuh"
#include "kernels/cuda/sm90/tensor_map.cuh"

namespace upmoe::cuda::sm90 {

constexpr int kGroupThreads = 128, kConsumers = 2, kBlockThreads = (kConsumers + 1) * kGroupThreads;
constexpr int kStepK = 64;  // elements of the summed dimension in a stage
constexpr int kWarpStagingBytes = 2048;

// How rows were routed: row r is token token_R[r]'s; rows [offsets[e], offsets[e + 1]) are expert e's.
struct Routing {
  const int* token_R;
  const int* offsets;  // [E + 1]
  int experts;
};

// Table: where a block finds its tiles.
template <int kStages_, int kABytes_, int kBBytes_, int kStagingBytes, class Table>
struct alignas(1024) Stages {
  static constexpr int kStages = kStages_, kABytes = kABytes_, kBBytes = kBBytes_;
  unsigned char a[kStages][kABytes], b[kStages][kBBytes];
  unsigned char staging[kConsumers * 4][kStagingBytes];  // of each warp that multiplies
  u64 full[kStages], empty[kStages];
  Table tiles;

  // By one thread, before the cluster's first barrier.
  __device__ void init(u32 producers, u32 releases) {
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(&full[i], producers);
      mbarrier_init(&empty[i], releases);
    }
  }
  __device__ unsigned char* warp_staging() { return staging[threadIdx.x / 32]; }
};

__device__ inline int group_of_thread() {
  return static_cast<int>(threadIdx.x / kGroupThreads);
}
__device__ inline int lane_of_thread() {
  return static_cast<int>(threadIdx.x % 32);
}
__device__ inline int warp_of_group() {
  return static_cast<int>(threadIdx.x / 32 % 4);
}

// Once a block's barriers and tiles are there: the third warpgroup brings operands, the others multiply, with
// kBringing and kMultiplying registers a thread.
template <int kBringing, int kMultiplying, class Bring, class Multiply>
__device__ inline void take_roles(const Bring& bring, const Multiply& multiply) {
  cluster_sync();  // the other block's barriers are there
  if (group_of_thread() == kConsumers) {
    setmaxnreg_dec<kBringing>();
    bring();
  } else {
    setmaxnreg_inc<kMultiplying>();
    multiply();
  }
  cluster_sync();  // nobody writes any more to a block that leaves
}

// 128 gathered rows, 64 elements of each a stage. A thread copies one chunk of every 16th row; which rows
// those are its warp's lanes found a tile ahead, one each.
class GatheredRows {
 public:
  __device__ void find(const Routing& routing, const RowTile& tile) {
    const int lane = lane_of_thread(), row = lane / 4 * 16 + warp_of_group() * 4 + lane % 4;
    token_ = row < tile.rows ? load_global<int>(routing.token_R + (tile.first_row + row)) : -1;
  }
  __device__ void begin(const bf16* x_TD, int width) {
    const int lane = lane_of_thread();
    next_ = x_TD + lane % 8 * 8;
    there_ = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int token = __shfl_sync(0xffffffffu, token_, 4 * i + lane / 8);
      there_ |= (token >= 0 ? 1u : 0u) << i;
      row_[i] = static_cast<u32>(token >= 0 ? token : 0) * static_cast<u32>(width / 8);
    }
  }
  // The next 64 elements; zeros for rows that do not exist.
  __device__ void copy(unsigned char* operand) {
    const u32 t = threadIdx.x % kGroupThreads;
    unsigned char* to = operand + swizzled(t / 8, t % 8);
#pragma unroll
    for (u32 i = 0; i < 8; ++i)
      cp_async_16(to + i * 16 * kRowBytes, next_ + std::size_t{row_[i]} * 8, (there_ >> i & 1) != 0);
    next_ += kStepK;
  }

 private:
  int token_ = -1;
  u32 there_ = 0, row_[8];      // which of this thread's rows exist; where they begin, in units of 16 bytes
  const bf16* next_ = nullptr;  // this thread's chunk of row 0
};

// Says `full` of the stages whose copies of this thread have come. With a lag the thread waits for them and shows them
// to the tensor cores, kLag stages behind the newest; without, the hardware says so, and who multiplies shows them.
template <int kLag>
class Arrivals {
 public:
  // Behind the copies to a stage.
  template <class S>
  __device__ void copied(S& s, u32 stage) {
    static_assert(kLag + 2 <= S::kStages,
                  "nobody could go on: a stage is free when products of the next have begun");
    if constexpr (kLag == 0) {
      cp_async_arrive(&s.full[stage]);
    } else {
      cp_async_commit();
      if (waiting_ < kLag) {
        ++waiting_;
        return;
      }
      cp_async_wait<kLag>();
      arrive(s, stage + S::kStages - kLag);
    }
  }
  // Behind the last of all, whose next stage would be `stage`.
  template <class S>
  __device__ void finish(S& s, u32 stage) {
    if constexpr (kLag > 0) {
      cp_async_wait<0>();
      for (; waiting_ > 0; --waiting_) arrive(s, stage + S::kStages - waiting_);
    }
  }

 private:
  template <class S>
  __device__ void arrive(S& s, u32 stage) {
    fence_proxy_async();
    mbarrier_arrive(&s.full[stage < S::kStages ? stage : stage - S::kStages]);
  }
  u32 waiting_ = 0;
};

// The rows of every tile of this block, `width` elements each, into operand a; weights(tile, stage, k) brings
// operand b, called by one thread. By all threads of the third warpgroup.
template <int kBlocks, int kLag, class S, class Tiles, class Weights>
__device__ inline void bring_gathered(S& s, const Tiles& tiles, const bf16* x_TD, int width,
                                      const Routing& routing, const Weights& weights) {
  const int rank = static_cast<int>(cluster_rank()), stride = static_cast<int>(gridDim.x) / kBlocks;
  int unit = static_cast<int>(blockIdx.x) / kBlocks;
  StageCounter<S::kStages> at;
  Arrivals<kLag> arrivals;
  GatheredRows gathered;
  RowTile tile, next;
  bool more = tiles.find(tile, unit, kBlocks, rank);
  if (more) gathered.find(routing, tile);
  while (more) {
    gathered.begin(x_TD, width);
    unit += stride;
    more = tiles.find(next, unit, kBlocks, rank);
    if (more) gathered.find(routing, next);
#pragma unroll 1  // registers: two steps at once need more than this warpgroup has
    for (int k = 0; k < width; k += kStepK, at.next()) {
      mbarrier_wait(&s.empty[at.stage], at.parity ^ 1);
      if (threadIdx.x % kGroupThreads == 0) weights(tile, at.stage, k);
      gathered.copy(s.a[at.stage]);
      arrivals.copied(s, at.stage);
    }
    tile = next;
  }
  arrivals.finish(s, at.stage);
}

// By one thread of each warp that multiplies: a stage may be written again, by every block of the cluster.
template <int kBlocks>
__device__ inline void release(u64* empty) {
  const u32 lane = threadIdx.x % 32;
  if constexpr (kBlocks == 1) {
    if (lane == 0) mbarrier_arrive(empty);
  } else {
    if (lane < kBlocks) mbarrier_arrive_remote(empty, lane);
  }
}

// A stage's operands. kCopied: copies of threads brought one of them, and nobody has shown it to the tensor cores.
template <bool kCopied>
__device__ inline void wait_full(u64* full, u32 parity) {
  mbarrier_wait(full, parity);
  if constexpr (kCopied) fence_proxy_async();
}

// Products of this warpgroup over `steps` stages, issued by products(stage, first); hold() names the
// registers that hold their sums. One stage's products run while the next one's are issued; `issued` is
// called when all are under way.
template <bool kCopied, int kBlocks, class S, class Hold, class Products, class Issued>
__device__ inline void multiply_stages(S& s, StageCounter<S::kStages>& at, int steps, const Hold& hold,
                                       const Products& products, const Issued& issued) {
  u32 before = 0;
  for (int step = 0; step < steps; ++step, at.next()) {
    wait_full<kCopied>(&s.full[at.stage], at.parity);
    hold();
    wgmma_fence();
    products(at.stage, step == 0);
    wgmma_commit();
    hold();
    if (step > 0) {
      wgmma_wait<1>();
      release<kBlocks>(&s.empty[before]);
    }
    before = at.stage;
  }
  issued();
  wgmma_wait<0>();  // on every path: under a condition ptxas would take all products one by one
  hold();
  if (steps > 0) release<kBlocks>(&s.empty[before]);
}

// A 64 x 256 product: this group's 64 rows of the 128 of operand a, all of operand b.
template <Major kA, Major kB, bool kCopied, int kBlocks, class S>
__device__ inline void multiply_64x256(float (&d)[128], S& s, StageCounter<S::kStages>& at, int steps) {
  const u32 group = threadIdx.x / kGroupThreads;
  multiply_stages<kCopied, kBlocks>(
      s, at, steps, [&] { wgmma_hold(d); },
      [&](u32 stage, bool first) {
        const unsigned char *a = s.a[stage], *b = s.b[stage];
#pragma unroll
        for (u32 k = 0; k < kStepK; k += 16) {
          const u64 da = kA == Major::kK ? k_major(a, group * 64, k) : mn_major(a + group * kPanelBytes, k);
          const u64 db = kB == Major::kK ? k_major(b, 0, k) : mn_major(b, k);
          wgmma_m64n256k16<kA, kB>(d, da, db, !first || k > 0);
        }
      },
      [] {});
}
// A 128 x 128 product as two of 64 x 128. `a` holds both halves, 64 rows of K or a panel after the other; b
// is by columns.
template <Major kA, bool kCopied, int kBlocks, class S, class A, class B, class Issued>
__device__ inline void multiply_128x128(float (&top)[64], float (&bottom)[64], S& s,
                                        StageCounter<S::kStages>& at, int steps, const A& a, const B& b,
                                        const Issued& issued) {
  multiply_stages<kCopied, kBlocks>(
      s, at, steps,
      [&] {
        wgmma_hold(top);
        wgmma_hold(bottom);
      },
      [&](u32 stage, bool first) {
#pragma unroll
        for (u32 k = 0; k < kStepK; k += 16) {
          const u64 db = mn_major(b(stage), k);
          const auto da = [&](u32 half) {
            return kA == Major::kK ? k_major(a(stage), half * 64, k)
                                   : mn_major(a(stage) + half * kPanelBytes, k);
          };
          wgmma_m64n128k16<kA, Major::kMN>(top, da(0), db, !first || k > 0);
          wgmma_m64n128k16<kA, Major::kMN>(bottom, da(1), db, !first || k > 0);
        }
      },
      issued);
}

// The stages of a tile in which this warpgroup has no rows.
template <int kBlocks, class S>
__device__ inline void pass_stages(S& s, StageCounter<S::kStages>& at, int steps) {
  for (int step = 0; step < steps; ++step, at.next()) {
    mbarrier_wait(&s.full[at.stage], at.parity);
    release<kBlocks>(&s.empty[at.stage]);
  }
}

// --- results: a warp's 16 rows go through its part of shared memory, 128 bytes of each at a time, so that
// global memory sees whole lines. ---

// Where chunk `chunk` of row `row` lies, so that lanes that write 4 bytes each (eight rows of one chunk) or 8
// bytes each (four rows of two chunks) meet in no bank.
template <int kLaneBytes>
__device__ inline u32 staged(u32 row, u32 chunk) {
  static_assert(kLaneBytes == 4 || kLaneBytes == 8);
  return kLaneBytes == 4 ? swizzled(row, chunk) : row * kRowBytes + ((chunk ^ (row & 3) << 1) << 4);
}

// The same chunk eight rows on, where both swizzles begin anew: an offset that takes no register.
constexpr u32 kEightRows = 8 * kRowBytes;

// Where lane's row of the matrices of stmatrix_x4 lies: matrices are (rows 0-7 | 8-15) of chunk, then of
// chunk + 1.
__device__ inline unsigned char* fragment_row(unsigned char* staging, u32 chunk) {
  const u32 lane = threadIdx.x % 32;
  return staging + staged<4>(lane % 16, chunk + lane / 16);
}

// A lane's 16 bytes of a line of 128, in 32 bits, which a warp's 16 rows do not exceed: half as many registers.
__device__ inline u32 line_of(int row, u32 row_bytes, int lane) {
  return static_cast<u32>(row) * row_bytes + static_cast<u32>(lane % 8 * 16);
}

// Rows of 128 bytes from shared to global memory, those below `rows`; `first` is the address of the first one.
template <int kLaneBytes>
__device__ inline void store_lines(const unsigned char* staging, unsigned char* first, u32 row_bytes,
                                   int rows) {
  const int lane = lane_of_thread();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = 4 * i + lane / 8;
    const auto line = load_shared<uint4>(staging + staged<kLaneBytes>(row, lane % 8));
    if (row < rows) store_global(first + line_of(row, row_bytes, lane), line);
  }
}
// The other way; rows that do not exist are zero.
template <int kLaneBytes>
__device__ inline void load_lines(unsigned char* staging, const unsigned char* first, u32 row_bytes,
                                  int rows) {
  const int lane = lane_of_thread();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = 4 * i + lane / 8;
    uint4 line{0, 0, 0, 0};
    if (row < rows) line = load_global<uint4>(first + line_of(row, row_bytes, lane));
    store_shared(staging + staged<kLaneBytes>(row, lane % 8), line);
  }
}

__device__ inline u32 add_pair(u32 old, float low, float high) {
  return pack_bf16(low_of(old) + low, high_of(old) + high);
}

// A warp's 16 rows of fp32 sums (two a column) as bf16; `first` is the address of the first row and column.
// With kAdd they are added to what stands there, in fp32.
template <bool kAdd, int kSums>
__device__ inline void store_sums(const float (&d)[kSums], unsigned char* staging, unsigned char* first,
                                  u32 row_bytes, int rows) {
#pragma unroll
  for (int part = 0; part < kSums / 32; ++part) {  // of 64 columns
    if constexpr (kAdd) {
      load_lines<4>(staging, first + part * kRowBytes, row_bytes, rows);
      __syncwarp();
    }
#pragma unroll
    for (int chunk = 0; chunk < 8; chunk += 2) {
      const float* v = d + 32 * part + 4 * chunk;
      unsigned char* row = fragment_row(staging, static_cast<u32>(chunk));
      if constexpr (kAdd) {
        u32 a, b, c, e;
        ldmatrix_x4(row, a, b, c, e);
        stmatrix_x4(row, add_pair(a, v[0], v[1]), add_pair(b, v[2], v[3]), add_pair(c, v[4], v[5]),
                    add_pair(e, v[6], v[7]));
      } else {
        stmatrix_x4(row, pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]),
                    pack_bf16(v[6], v[7]));
      }
    }
    __syncwarp();
    store_lines<4>(staging, first + part * kRowBytes, row_bytes, rows);
    __syncwarp();
  }
}

}  // namespace upmoe::cuda::sm90
