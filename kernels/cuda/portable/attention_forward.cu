// Attention with an online softmax: scores exist a tile at a time.

#include "kernels/cuda/portable/attention_tiles.cuh"

namespace upmoe::cuda {

namespace {

// A thread's rows of the softmax so far.
template <int C>
struct Softmax {
  float largest[Tile<C>::kEach], sum[Tile<C>::kEach], out[Tile<C>::kEach][C];
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

template <int C, class T, class Out>
__device__ void store_rows(Out* out, float* lse, const Softmax<C>& soft, const AttentionInputs<T>& in,
                           const Place& at) {
  using L = Tile<C>;
  const int ty = static_cast<int>(threadIdx.x) / kSide, tx = static_cast<int>(threadIdx.x) % kSide;
#pragma unroll
  for (int i = 0; i < L::kEach; ++i) {
    const int q = at.tile * L::kRows + ty * L::kEach + i;
    if (q >= in.seq_len) continue;
    const std::int64_t row = (at.sequence * in.seq_len + q) * in.heads + at.head;
    const float factor = soft.sum[i] > 0 ? 1.0f / soft.sum[i] : 0.0f;
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const int d = tx + kSide * c;
      if (d < in.head_dim) out[row * in.head_dim + d] = from_float<Out>(soft.out[i][c] * factor);
    }
    if (tx == 0) lse[row] = soft.sum[i] > 0 ? soft.largest[i] + logf(soft.sum[i]) : -INFINITY;
  }
}

// One block: one tile of queries of one head, against all tiles of keys that it sees.
//
//   tiles of     keys
//   queries    0 1 2 3      The queries stay in shared memory, their softmax and output in registers: a thread has
//         0    d            B / 16 queries and every 16th column of the output. A tile of keys comes, gives scores,
//         1    # d          B / 16 by B / 16 a thread, and makes room for its values in the same memory.
//         2    #>#>d        d: the diagonal, where a query sees keys up to itself; without `causal` all are #. Tiles
//         3    # # # d      that the window has passed are left out.
template <int C, class T, class Out>
__global__ void __launch_bounds__(kThreads) attend_tile(Out* out, float* lse, AttentionInputs<T> in) {
  using L = Tile<C>;
  float* queries = dynamic_shared<float>();
  float* keys = queries + L::kTransposed;  // then the values
  float* probability = keys + L::kTransposed;
  const int tiles = in.tiles(L::kRows), ty = static_cast<int>(threadIdx.x) / kSide;
  const Place at = place_of_block(tiles, in.heads);
  const std::int64_t first = at.sequence * in.seq_len;
  const int kv_column = at.head / in.group() * in.head_dim;
  Softmax<C> soft;
#pragma unroll
  for (int i = 0; i < L::kEach; ++i) {
    soft.largest[i] = -INFINITY;
    soft.sum[i] = 0;
#pragma unroll
    for (int c = 0; c < C; ++c) soft.out[i][c] = 0;
  }
  load_transposed<C>(queries, in.q + (first + at.tile * L::kRows) * in.q_stride + at.head * in.head_dim,
                     in.q_stride, min(L::kRows, in.seq_len - at.tile * L::kRows), in.head_dim, in.scale);
  const int last = in.last_key_tile(at.tile, L::kRows);
  for (int tile = in.first_key_tile(at.tile, L::kRows); tile <= last; ++tile) {
    const TilePair pair = pair_of(in, at.sequence, at.tile, tile, L::kRows);
    if (!documents_meet(pair)) continue;
    const std::int64_t row = (first + tile * L::kRows) * in.kv_stride + kv_column;
    __syncthreads();  // the values of the tile before have been used
    load_transposed<C>(keys, in.k + row, in.kv_stride, pair.keys, in.head_dim, 1.0f);
    __syncthreads();
    float score[L::kEach][L::kEach];
    multiply<C>(score, queries, keys, in.head_dim);
    update<C>(soft, score, pair, probability);
    __syncthreads();
    load_transposed<C>(keys, in.v + row, in.kv_stride, pair.keys, in.head_dim, 1.0f);
    __syncthreads();
    accumulate<C>(
        soft.out, [&](int i, int m) { return probability[(ty * L::kEach + i) * (L::kRows + 1) + m]; }, keys);
  }
  store_rows<C>(out, lse, soft, in, at);
}

}  // namespace

template <class T, class Out>
void attend(const Exec& ex, Out* out, float* lse, const AttentionInputs<T>& in, std::int64_t tokens) {
  with_head_columns(in.head_dim, [&](auto c) {
    using L = Tile<c.value>;
    launch_tiles(ex, 2 * L::kTransposed + L::kScores, tokens / in.seq_len * in.heads * in.tiles(L::kRows),
                 attend_tile<c.value, T, Out>, out, lse, in);
  });
}

template void attend(const Exec&, float*, float*, const AttentionInputs<float>&, std::int64_t);
template void attend(const Exec&, bf16*, float*, const AttentionInputs<bf16>&, std::int64_t);
template void attend(const Exec&, float*, float*, const AttentionInputs<bf16>&, std::int64_t);

}  // namespace upmoe::cuda
