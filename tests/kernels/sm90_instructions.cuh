#pragma once
// One small kernel for each wrapper of an instruction, and what it must give: the same sources run on the
// model of the hardware (sm90_instructions_test.cpp) and on a GPU (tests/bench/sm90), which shows that model
// and hardware agree.

#include <cmath>
#include <vector>

#include "kernels/core/bf16.h"
#include "kernels/cuda/sm90/sm90.cuh"
#include "kernels/cuda/sm90/tensor_map.cuh"

namespace upmoe::cuda::sm90 {

constexpr int kImageBytes = 16384;  // of shared memory, shown to the host as it lies

// --- products: a (64 x 64) b (64 x N), loaded by the copy engine ---
template <int N>
struct alignas(1024) ProductShared {
  unsigned char a[64 * kRowBytes], b[N * kRowBytes];
  u64 full;
};
template <Major kA, Major kB, int N>
__global__ void product_kernel(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b,
                               float* out) {
  auto& s = dynamic_shared<ProductShared<N>>();
  if (threadIdx.x == 0) {
    mbarrier_init(&s.full, 1);
    fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(&s.full, (64 + N) * kRowBytes);
    tma_load(s.a, a, &s.full, 0, 0);
    if (kB == Major::kK) tma_load(s.b, b, &s.full, 0, 0);
    for (int panel = 0; kB == Major::kMN && panel < N / 64; ++panel)
      tma_load(s.b + panel * kPanelBytes, b, &s.full, panel * 64, 0);
  }
  mbarrier_wait(&s.full, 0);
  float d[N / 2];
  wgmma_hold(d);
  wgmma_fence();
#pragma unroll
  for (u32 k = 0; k < 64; k += 16) {
    const u64 da = kA == Major::kK ? k_major(s.a, 0, k) : mn_major(s.a, k);
    const u64 db = kB == Major::kK ? k_major(s.b, 0, k) : mn_major(s.b, k);
    if constexpr (N == 256)
      wgmma_m64n256k16<kA, kB>(d, da, db, k > 0);
    else
      wgmma_m64n128k16<kA, kB>(d, da, db, k > 0);
  }
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_hold(d);
#pragma unroll
  for (int i = 0; i < N / 2; ++i) out[static_cast<int>(threadIdx.x) * (N / 2) + i] = d[i];
}

// --- the copy engine: what a box looks like in shared memory; with `blocks` = 2 each block brings half of it
// to both ---
struct alignas(1024) ImageShared {
  unsigned char image[kImageBytes];
  u64 full, told;
};
__device__ inline void show_image(const ImageShared& s, unsigned char* out) {
  const u32 rank = cluster_rank();
  for (u32 i = threadIdx.x; i < kImageBytes; i += blockDim.x) out[rank * kImageBytes + i] = s.image[i];
}
template <int kRank>
__global__ void box_kernel(const __grid_constant__ TensorMap map, const int* at, unsigned char* out) {
  auto& s = dynamic_shared<ImageShared>();
  if (threadIdx.x == 0) {
    mbarrier_init(&s.full, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect_tx(&s.full, kImageBytes);
    if constexpr (kRank == 2) tma_load(s.image, map, &s.full, at[0], at[1]);
    if constexpr (kRank == 3) tma_load(s.image, map, &s.full, at[0], at[1], at[2]);
    if constexpr (kRank == 5) tma_load(s.image, map, &s.full, at[0], at[1], at[2], at[3], at[4]);
  }
  __syncthreads();
  mbarrier_wait(&s.full, 0);
  show_image(s, out);
}
// Blocks of a cluster of two: halves along the fourth (5-D) or second (3-D) dimension, to both.
template <int kRank>
__global__ void multicast_kernel(const __grid_constant__ TensorMap map, unsigned char* out) {
  auto& s = dynamic_shared<ImageShared>();
  if (threadIdx.x == 0) {
    mbarrier_init(&s.full, 1);
    mbarrier_init(&s.told, 2);
    fence_mbarrier_init();
    mbarrier_arrive_expect_tx(&s.full, kImageBytes);
  }
  cluster_sync();
  const int rank = static_cast<int>(cluster_rank());
  if (threadIdx.x == 0) {
    if constexpr (kRank == 3)
      tma_load_multicast(3, s.image + rank * kImageBytes / 2, map, &s.full, 0, rank * 64, 1);
    if constexpr (kRank == 5)
      tma_load_multicast(3, s.image + rank * kImageBytes / 2, map, &s.full, 0, 0, 0, rank * 4, 1);
  }
  mbarrier_wait(&s.full, 0);
  show_image(s, out);
  if (threadIdx.x < 2) mbarrier_arrive_remote(&s.told, threadIdx.x);  // both blocks tell both
  mbarrier_wait(&s.told, 0);
  cluster_sync();
}

// --- stores to other blocks: every block tells every block a number, itself included ---
struct ExchangeShared {
  double from[4];
};
__global__ void exchange_kernel(double* out) {
  auto& s = dynamic_shared<ExchangeShared>();
  const u32 rank = cluster_rank();
  cluster_arrive();
  cluster_wait();
  if (threadIdx.x < 4) store_remote(&s.from[rank], threadIdx.x, 100.0 * rank + threadIdx.x);
  __syncwarp();
  cluster_sync();
  if (threadIdx.x < 4) out[rank * 4 + threadIdx.x] = s.from[threadIdx.x];
}

// --- shared memory: where it begins, and the last byte of all that a block may have ---
struct alignas(1024) WholeShared {
  unsigned char bytes[227 << 10];
};
__global__ void whole_kernel(u32* out) {
  auto& s = dynamic_shared<WholeShared>();
  constexpr u32 kLast = sizeof(WholeShared) - 1;
  if (threadIdx.x == 0) s.bytes[kLast] = static_cast<unsigned char>(7 + cluster_rank());
  __syncthreads();
  if (threadIdx.x == 1) {
    out[2 * blockIdx.x] = shared_address(&s) % 1024;
    out[2 * blockIdx.x + 1] = s.bytes[kLast];
  }
}

// --- copies by threads: every third chunk is zero, and would come from where the kernels' own are: far outside ---
__device__ inline const bf16* chunk_or_far(const bf16* from, u32 c) {
  return from + (c % 3 != 0 ? std::size_t{c} : std::size_t{0xffffffffu}) * 8;
}
__global__ void copies_kernel(const bf16* from, unsigned char* out) {
  auto& s = dynamic_shared<ImageShared>();
  for (u32 c = threadIdx.x; c < kImageBytes / 16; c += blockDim.x) {
    cp_async_16(s.image + swizzled(c / 8, c % 8), chunk_or_far(from, c), c % 3 != 0);
    cp_async_commit();
  }
  cp_async_wait<0>();
  fence_proxy_async();
  __syncthreads();
  show_image(s, out);
}

// --- the same, told by the copies themselves ---
__global__ void arriving_copies_kernel(const bf16* from, unsigned char* out) {
  auto& s = dynamic_shared<ImageShared>();
  if (threadIdx.x == 0) {
    mbarrier_init(&s.full, blockDim.x);
    fence_mbarrier_init();
  }
  __syncthreads();
  for (u32 c = threadIdx.x; c < kImageBytes / 16; c += blockDim.x)
    cp_async_16(s.image + swizzled(c / 8, c % 8), chunk_or_far(from, c), c % 3 != 0);
  cp_async_arrive(&s.full);
  mbarrier_wait(&s.full, 0);
  show_image(s, out);
}

// --- fragments: a warp stores four matrices and loads them again ---
__global__ void matrices_kernel(unsigned char* image, u32* loaded) {
  auto& s = dynamic_shared<ImageShared>();
  const u32 lane = threadIdx.x % 32;
  u32 r[4];
  for (u32 m = 0; m < 4; ++m) r[m] = (1000 * m + 2 * lane) | (1000 * m + 2 * lane + 1) << 16;
  for (u32 i = lane; i < kImageBytes / 4; i += 32) reinterpret_cast<u32*>(s.image)[i] = 0;
  __syncwarp();
  unsigned char* row = s.image + lane * 16;
  stmatrix_x4(row, r[0], r[1], r[2], r[3]);
  __syncwarp();
  u32 q[4];
  ldmatrix_x4(row, q[0], q[1], q[2], q[3]);
  for (u32 m = 0; m < 4; ++m) loaded[lane * 4 + m] = q[m];
  __syncwarp();
  show_image(s, image);
}

// --- registers: two warpgroups take what the third gives; and pairs of bf16 ---
__global__ void __launch_bounds__(384, 1) registers_kernel(const float* x, u32* out) {
  if (threadIdx.x / 128 == 2)
    setmaxnreg_dec<40>();
  else
    setmaxnreg_inc<232>();
  out[threadIdx.x] = pack_bf16(x[2 * threadIdx.x], x[2 * threadIdx.x + 1]);
}

// --- what they must give ---

// Of element `column` of row `row` in an image of 128-byte rows.
inline std::uint16_t image_at(const std::vector<unsigned char>& image, std::size_t row, std::size_t column) {
  const std::size_t byte = row * 128 + ((column / 8 ^ row % 8) << 4) + column % 8 * 2;
  return static_cast<std::uint16_t>(image[byte] | image[byte + 1] << 8);
}
// The row and column of register i of a thread of the warpgroup.
inline int row_of_sum(int thread, int i) {
  return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
}
inline int column_of_sum(int thread, int i) {
  return i / 4 * 8 + thread % 4 * 2 + i % 2;
}
// a is [64, 64] as rows of K, or of M; b is [N, 64] as rows of K, or [64, N] as rows of N.
template <Major kA, Major kB, int N>
double error_of_product(const std::vector<bf16>& a, const std::vector<bf16>& b,
                        const std::vector<float>& out) {
  double difference = 0, norm = 0;
  for (int t = 0; t < 128; ++t)
    for (int i = 0; i < N / 2; ++i) {
      const int m = row_of_sum(t, i), n = column_of_sum(t, i);
      double want = 0;
      for (int k = 0; k < 64; ++k) {
        const auto at_a = static_cast<std::size_t>(kA == Major::kK ? m * 64 + k : k * 64 + m),
                   at_b = static_cast<std::size_t>(kB == Major::kK ? n * 64 + k : k * N + n);
        want += static_cast<double>(to_float(a[at_a])) * static_cast<double>(to_float(b[at_b]));
      }
      const double got = static_cast<double>(out[static_cast<std::size_t>(t * (N / 2) + i)]);
      difference += (got - want) * (got - want);
      norm += want * want;
    }
  return std::sqrt(difference / norm);
}

}  // namespace upmoe::cuda::sm90
