#pragma once
// Softmax cross-entropy and its gradient, every logit read from memory once.
//
// A cluster has a row, each of its P blocks a share of it, which stays in shared memory:
//
//   row        | share 0    | share 1    | ...  | share P-1  |    151,936 fp32 logits in 8 blocks: 74 KiB each,
//                   v            v                  v             and three rows on a multiprocessor at once, where
//   shared     |  x -> e    |  x -> e    | ...  |  x -> e    |    one loads while another stores
//                 m, s         m, s                m, s
//                 `------------`-- to all blocks --'
//   gradient   | e * factor | e * factor | ...  | e * factor |
//
// e = exp(x - m), m being the largest logit of the share and s the sum of its e. The shares' (m, s), a part of a
// softmax each, are joined in their order, in fp64, by every block alike. The gradient of a logit is then e times one
// factor of its block, exp(m - largest) scale / sum.

#include <cstdint>

#include "kernels/cuda/runtime/block.cuh"
#include "kernels/cuda/runtime/exponential.cuh"
#include "kernels/cuda/sm90/cross_entropy.cuh"
#include "kernels/cuda/sm90/sm90_ptx.cuh"

namespace upmoe::cuda::sm90 {

constexpr int kRowThreads = 512, kRowPack = 4;

struct alignas(16) RowShared {
  double most[kShares], sum[kShares], target;  // by their blocks; `target` by the one that has it
  double warp_sum[kRowThreads / kWarp];
  float warp_most[kRowThreads / kWarp];
};

// Logits of a block: whole packs, the last blocks have fewer.
__host__ __device__ inline int share_of(int columns, int blocks) {
  return (columns / kRowPack + blocks - 1) / blocks * kRowPack;
}
inline std::size_t row_shared_bytes(int columns, int blocks) {
  return sizeof(RowShared) + static_cast<std::size_t>(share_of(columns, blocks)) * sizeof(float);
}

// This thread's packs of `n` logits of x go to `kept`; returns the largest of them.
__device__ inline float keep_share(float* kept, const float* x, int n) {
  float most = kLeastLogit;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x) * kRowPack; i < n; i += kRowThreads * kRowPack) {
    float v[kRowPack];
    load_floats(v, x + i);
    store_floats(kept + i, v);
#pragma unroll
    for (int j = 0; j < kRowPack; ++j) most = fmaxf(most, v[j]);
  }
  return most;
}

// Its packs become exp(x - most); returns their sum.
template <class T>
__device__ float exponentials(float* kept, int n, float most) {
  float sum = 0;
#pragma unroll 2
  for (int i = static_cast<int>(threadIdx.x) * kRowPack; i < n; i += kRowThreads * kRowPack) {
    float v[kRowPack];
    load_floats(v, kept + i);
#pragma unroll
    for (int j = 0; j < kRowPack; ++j) {
      v[j] = exponential<sizeof(T) == 2>(v[j] - most);
      sum += v[j];
    }
    store_floats(kept + i, v);
  }
  return sum;
}

template <class T>
__device__ void store_gradient(T* dx, const float* kept, int n, float factor) {
#pragma unroll 2
  for (int i = static_cast<int>(threadIdx.x) * kRowPack; i < n; i += kRowThreads * kRowPack) {
    float v[kRowPack];
    load_floats(v, kept + i);
#pragma unroll
    for (int j = 0; j < kRowPack; ++j) v[j] *= factor;
    store_floats(dx + i, v);
  }
}

template <class T>
__device__ void store_zeros(T* dx, int n) {
  const float zeros[kRowPack] = {};
  for (int i = static_cast<int>(threadIdx.x) * kRowPack; i < n; i += kRowThreads * kRowPack)
    store_floats(dx + i, zeros);
}

// The softmax of the whole row, from what its shares have left in this block.
struct RowStats {
  double largest, sum;
};
__device__ inline RowStats join_shares(const RowShared& s, int blocks) {
  RowStats all{s.most[0], 0};
  for (int b = 1; b < blocks; ++b) all.largest = fmax(all.largest, s.most[b]);
  for (int b = 0; b < blocks; ++b)
    all.sum += s.sum[b] * static_cast<double>(expf(static_cast<float>(s.most[b] - all.largest)));
  return all;
}

struct CrossEntropyRows {
  const float* logits;  // [rows, columns]; columns a multiple of kRowPack, addresses of whole packs
  const std::int32_t* targets;
  int columns, blocks;  // of a cluster
  float scale;
};

// A target that is no column: an ignored row. dlogits may be the logits.
template <class T>
__global__ void __launch_bounds__(kRowThreads, 3)
    cross_entropy_row_kernel(float* loss, T* dlogits, CrossEntropyRows r) {
  auto& s = dynamic_shared<RowShared>();
  auto* kept = reinterpret_cast<float*>(&s + 1);
  const int rank = static_cast<int>(cluster_rank()), share = share_of(r.columns, r.blocks),
            begin = rank * share, n = max(0, min(share, r.columns - begin));
  const std::int64_t row = blockIdx.x / static_cast<unsigned>(r.blocks), first = row * r.columns + begin;
  const int target = r.targets[row], at = target - begin;
  const bool speaks = rank == 0 && threadIdx.x == 0;
  if (target < 0 || target >= r.columns) {  // for all blocks of the cluster alike
    if (speaks) loss[row] = 0;
    return store_zeros(dlogits + first, n);
  }
  cluster_arrive();  // this block has begun: others may write to it
  const bool has_target = at >= 0 && at < n && at / kRowPack % kRowThreads == static_cast<int>(threadIdx.x);
  const float most = keep_share(kept, r.logits + first, n);
  const float at_target = has_target ? kept[at] : 0.0f;  // of a pack of this thread
  const float largest = block_max(most, s.warp_most);
  const double sum = block_sum(static_cast<double>(exponentials<T>(kept, n, largest)), s.warp_sum);
  cluster_wait();
  if (threadIdx.x < static_cast<unsigned>(r.blocks)) {
    store_remote(&s.most[rank], threadIdx.x, static_cast<double>(largest));
    store_remote(&s.sum[rank], threadIdx.x, sum);
  }
  if (has_target)
    for (int b = 0; b < r.blocks; ++b)
      store_remote(&s.target, static_cast<u32>(b), static_cast<double>(at_target));
  __syncwarp();
  cluster_sync();  // nobody writes to another block from here on
  const RowStats all = join_shares(s, r.blocks);
  if (speaks) loss[row] = static_cast<float>(log(all.sum) + (all.largest - s.target));
  const float whole = static_cast<float>(all.largest);
  store_gradient(dlogits + first, kept, n,
                 static_cast<float>(static_cast<double>(r.scale) *
                                    static_cast<double>(expf(largest - whole)) / all.sum));
  if (has_target)
    dlogits[first + at] =
        from_float<T>(r.scale * (expf(at_target - whole) / static_cast<float>(all.sum) - 1.0f));
}

}  // namespace upmoe::cuda::sm90
