#pragma once
// A tile of queries goes along tiles of keys with an online softmax: what attention over whole sequences
// (attention_forward.cu) and over a cache (attention_run.cu) share. Queries stay in shared memory, their softmax and
// output in registers: a thread has B / 16 queries and every 16th column of the output. A tile of keys comes, gives
// scores, B / 16 by B / 16 a thread, and makes room for its values in the same memory.

#include "kernels/cuda/portable/attention_tiles.cuh"

namespace upmoe::cuda {

// In dynamic shared memory, of kTileFloats<C>.
struct TileMemory {
  float *queries, *keys, *probability;  // keys, then their values
};
template <int C>
constexpr int kTileFloats = 2 * Tile<C>::kTransposed + Tile<C>::kScores;
template <int C>
__device__ TileMemory tile_memory() {
  float* queries = dynamic_shared<float>();
  return {queries, queries + Tile<C>::kTransposed, queries + 2 * Tile<C>::kTransposed};
}

// A thread's rows of the softmax so far.
template <int C>
struct Softmax {
  float largest[Tile<C>::kEach], sum[Tile<C>::kEach], out[Tile<C>::kEach][C];

  __device__ void begin() {
#pragma unroll
    for (int i = 0; i < Tile<C>::kEach; ++i) {
      largest[i] = -INFINITY;
      sum[i] = 0;
#pragma unroll
      for (int c = 0; c < C; ++c) out[i][c] = 0;
    }
  }
};

// A value of every thread along a row of the tile: 16 neighbouring lanes.
template <class Join>
__device__ float across_row(float x, const Join& join) {
#pragma unroll
  for (int lanes = kSide / 2; lanes > 0; lanes /= 2) x = join(x, __shfl_xor_sync(kAllLanes, x, lanes));
  return x;
}

// Scores become probabilities relative to the largest so far, and what was summed before is scaled to it.
template <int C>
__device__ void update(Softmax<C>& soft, float (&score)[Tile<C>::kEach][Tile<C>::kEach], const TilePair& pair,
                       float* probability) {
  using L = Tile<C>;
  const int ty = static_cast<int>(threadIdx.x) / kSide, tx = static_cast<int>(threadIdx.x) % kSide;
#pragma unroll
  for (int i = 0; i < L::kEach; ++i) {
    const int q = ty * L::kEach + i;
    float most = -INFINITY;
#pragma unroll
    for (int j = 0; j < L::kEach; ++j) {
      if (!pair.sees(q, tx * L::kEach + j)) score[i][j] = -INFINITY;
      most = fmaxf(most, score[i][j]);
    }
    most = fmaxf(soft.largest[i], across_row(most, [](float a, float b) { return fmaxf(a, b); }));
    const float offset = most == -INFINITY ? 0.0f : most;  // a query that has seen no key yet
    const float before = expf(soft.largest[i] - offset);
    float sum = 0;
#pragma unroll
    for (int j = 0; j < L::kEach; ++j) {
      const float p = expf(score[i][j] - offset);
      probability[q * (L::kRows + 1) + tx * L::kEach + j] = p;
      sum += p;
    }
    soft.sum[i] = soft.sum[i] * before + across_row(sum, [](float a, float b) { return a + b; });
    soft.largest[i] = most;
#pragma unroll
    for (int c = 0; c < C; ++c) soft.out[i][c] *= before;
  }
}

// One tile of keys and its values, whose rows are where key_row and value_row say. The queries are there or behind a
// barrier that this begins with.
template <int C, class KeyRow, class ValueRow>
__device__ void attend_keys(Softmax<C>& soft, const KeyRow& key_row, const ValueRow& value_row,
                            const TilePair& pair, const TileMemory& memory, int head_dim) {
  using L = Tile<C>;
  const int ty = static_cast<int>(threadIdx.x) / kSide;
  __syncthreads();  // the values of the tile before have been used
  load_transposed<C>(memory.keys, key_row, pair.keys, head_dim, 1.0f);
  __syncthreads();
  float score[L::kEach][L::kEach];
  multiply<C>(score, memory.queries, memory.keys, head_dim);
  update<C>(soft, score, pair, memory.probability);
  __syncthreads();
  load_transposed<C>(memory.keys, value_row, pair.keys, head_dim, 1.0f);
  __syncthreads();
  accumulate<C>(
      soft.out, [&](int i, int m) { return memory.probability[(ty * L::kEach + i) * (L::kRows + 1) + m]; },
      memory.keys);
}

// This thread's columns of its i-th query; 0 where it has seen no key.
template <int C, class Out>
__device__ void store_query(Out* out, const Softmax<C>& soft, int i, int head_dim) {
  const int tx = static_cast<int>(threadIdx.x) % kSide;
  const float factor = soft.sum[i] > 0 ? 1.0f / soft.sum[i] : 0.0f;
#pragma unroll
  for (int c = 0; c < C; ++c) {
    const int d = tx + kSide * c;
    if (d < head_dim) out[d] = from_float<Out>(soft.out[i][c] * factor);
  }
}

}  // namespace upmoe::cuda
