// The gradients of attention, without atomics: blocks that own queries make dq, blocks that own keys make dk
// and dv. With delta = rowsum(dout out) and p = exp(s - lse): dv = p^T dout, dp = dout v^T, ds = p (dp -
// delta), dq = scale ds k, dk = ds^T (scale q).

#include "kernels/cuda/portable/attention_tiles.cuh"

namespace upmoe::cuda {

namespace {

// One warp, one row of a head.
template <class T>
__global__ void row_deltas(float* delta, const T* dout, const T* out, std::int64_t rows, int head_dim) {
  const std::int64_t row = global_thread() / kWarp;
  if (row >= rows) return;
  float sum = 0;
  for (int d = static_cast<int>(threadIdx.x) % kWarp; d < head_dim; d += kWarp)
    sum += to_float(dout[row * head_dim + d]) * to_float(out[row * head_dim + d]);
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) delta[row] = sum;
}

// What it left behind, and the gradient that comes in.
template <class T>
struct Forward {
  const T* dout;
  const float *lse, *delta;
};

// Scores and dp become p and ds. A query without keys has no gradient.
template <int C, class T>
__device__ void differentiate(float (&score)[Tile<C>::kEach][Tile<C>::kEach],
                              float (&dp)[Tile<C>::kEach][Tile<C>::kEach], const TilePair& pair,
                              const Forward<T>& f, std::int64_t first_row, int heads) {
  using L = Tile<C>;
  const int ty = static_cast<int>(threadIdx.x) / kSide, tx = static_cast<int>(threadIdx.x) % kSide;
#pragma unroll
  for (int i = 0; i < L::kEach; ++i) {
    const int q = ty * L::kEach + i;
    const float lse = q < pair.queries ? f.lse[first_row + static_cast<std::int64_t>(q) * heads] : 0.0f;
    const float delta = q < pair.queries ? f.delta[first_row + static_cast<std::int64_t>(q) * heads] : 0.0f;
#pragma unroll
    for (int j = 0; j < L::kEach; ++j) {
      // lse is -inf where a query sees no key: s - lse would be inf or no number.
      const bool seen = pair.sees(q, tx * L::kEach + j) && lse != -INFINITY;
      score[i][j] = seen ? expf(score[i][j] - lse) : 0.0f;
      dp[i][j] = score[i][j] * (dp[i][j] - delta);
    }
  }
}

template <int C>
__device__ void store_tile(float* tile, const float (&values)[Tile<C>::kEach][Tile<C>::kEach]) {
  using L = Tile<C>;
  const int ty = static_cast<int>(threadIdx.x) / kSide, tx = static_cast<int>(threadIdx.x) % kSide;
#pragma unroll
  for (int i = 0; i < L::kEach; ++i)
#pragma unroll
    for (int j = 0; j < L::kEach; ++j)
      tile[(ty * L::kEach + i) * (L::kRows + 1) + tx * L::kEach + j] = values[i][j];
}

// dst = or += this thread's rows, of those there are.
template <int C, bool kAdd, class Out>
__device__ void store_gradient(Out* dst, std::int64_t stride, const float (&acc)[Tile<C>::kEach][C], int rows,
                               int head_dim, float scale) {
  using L = Tile<C>;
  const int ty = static_cast<int>(threadIdx.x) / kSide, tx = static_cast<int>(threadIdx.x) % kSide;
#pragma unroll
  for (int i = 0; i < L::kEach; ++i) {
    const int r = ty * L::kEach + i;
    if (r >= rows) continue;
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const int d = tx + kSide * c;
      if (d >= head_dim) continue;
      Out& x = dst[r * stride + d];
      x = from_float<Out>((kAdd ? to_float(x) : 0.0f) + acc[i][c] * scale);
    }
  }
}

template <int C>
__device__ void clear(float (&acc)[Tile<C>::kEach][C]) {
#pragma unroll
  for (int i = 0; i < Tile<C>::kEach; ++i)
#pragma unroll
    for (int c = 0; c < C; ++c) acc[i][c] = 0;
}

// One block: one tile of queries of one head, along its row of tiles of keys as in the forward; dq stays in
// registers and is written once.
template <int C, bool kAdd, class T, class Out>
__global__ void __launch_bounds__(kThreads)
    query_gradient(AttentionGradients<T, Out> g, Forward<T> f, AttentionInputs<T> in) {
  using L = Tile<C>;
  float* queries = dynamic_shared<float>();
  float *douts = queries + L::kTransposed, *keys = douts + L::kTransposed, *values = keys + L::kTransposed;
  float* ds = values + L::kTransposed;
  const int tiles = in.tiles(L::kRows), ty = static_cast<int>(threadIdx.x) / kSide;
  const Place at = place_of_block(tiles, in.heads);
  const std::int64_t first = at.sequence * in.seq_len, query = first + at.tile * L::kRows;
  const int column = at.head * in.head_dim, kv_column = at.head / in.group() * in.head_dim;
  const int rows = min(L::kRows, in.seq_len - at.tile * L::kRows);
  const std::int64_t out_stride = static_cast<std::int64_t>(in.heads) * in.head_dim;
  load_transposed<C>(queries, in.q + query * in.q_stride + column, in.q_stride, rows, in.head_dim, in.scale);
  load_transposed<C>(douts, f.dout + query * out_stride + column, out_stride, rows, in.head_dim, 1.0f);
  float dq[L::kEach][C];
  clear<C>(dq);
  const int last = in.last_key_tile(at.tile, L::kRows);
  for (int tile = in.first_key_tile(at.tile, L::kRows); tile <= last; ++tile) {
    const TilePair pair = pair_of(in, at.sequence, at.tile, tile, L::kRows);
    if (!documents_meet(pair)) continue;
    const std::int64_t row = (first + tile * L::kRows) * in.kv_stride + kv_column;
    __syncthreads();
    load_transposed<C>(keys, in.k + row, in.kv_stride, pair.keys, in.head_dim, 1.0f);
    load_transposed<C>(values, in.v + row, in.kv_stride, pair.keys, in.head_dim, 1.0f);
    __syncthreads();
    float score[L::kEach][L::kEach], dp[L::kEach][L::kEach];
    multiply<C>(score, queries, keys, in.head_dim);
    multiply<C>(dp, douts, values, in.head_dim);
    differentiate<C>(score, dp, pair, f, query * in.heads + at.head, in.heads);
    store_tile<C>(ds, dp);
    __syncthreads();
    accumulate<C>(
        dq, [&](int i, int m) { return ds[(ty * L::kEach + i) * (L::kRows + 1) + m]; }, keys);
  }
  store_gradient<C, kAdd>(g.dq + query * g.dq_stride + column, g.dq_stride, dq, rows, in.head_dim, in.scale);
}

// One block: one tile of keys of one key/value head, against the queries of all heads of its group, in order. dk
// and dv stay in registers. Scores are made a second time here: the price of one writer for every gradient.
//
//   tiles of     keys
//   queries    0 1 2 3      A block goes down its column of tiles from the diagonal on, once for each head of the
//         0    d            group, and reads p and ds of a pair of tiles transposed from shared memory.
//         1    # d
//         2    # # d
//         3    # # v d
template <int C, bool kAdd, class T, class Out>
__global__ void __launch_bounds__(kThreads)
    key_gradients(AttentionGradients<T, Out> g, Forward<T> f, AttentionInputs<T> in) {
  using L = Tile<C>;
  float* keys = dynamic_shared<float>();
  float *values = keys + L::kTransposed, *queries = values + L::kTransposed,
        *douts = queries + L::kTransposed;
  float *p = douts + L::kTransposed, *ds = p + L::kScores;
  const int tiles = in.tiles(L::kRows), ty = static_cast<int>(threadIdx.x) / kSide;
  Place at = place_of_block(tiles, in.kv_heads);
  at.tile = tiles - 1 - at.tile;  // the first keys are seen by the most queries
  const std::int64_t first = at.sequence * in.seq_len, key = first + at.tile * L::kRows;
  const int column = at.head * in.head_dim, rows = min(L::kRows, in.seq_len - at.tile * L::kRows);
  const std::int64_t out_stride = static_cast<std::int64_t>(in.heads) * in.head_dim;
  load_transposed<C>(keys, in.k + key * in.kv_stride + column, in.kv_stride, rows, in.head_dim, 1.0f);
  load_transposed<C>(values, in.v + key * in.kv_stride + column, in.kv_stride, rows, in.head_dim, 1.0f);
  float dk[L::kEach][C], dv[L::kEach][C];
  clear<C>(dk);
  clear<C>(dv);
  const int last = in.last_query_tile(at.tile, L::kRows);
  for (int head = at.head * in.group(); head < (at.head + 1) * in.group(); ++head)
    for (int tile = in.first_query_tile(at.tile); tile <= last; ++tile) {
      const TilePair pair = pair_of(in, at.sequence, tile, at.tile, L::kRows);
      if (!documents_meet(pair)) continue;
      const std::int64_t query = first + tile * L::kRows;
      __syncthreads();
      load_transposed<C>(queries, in.q + query * in.q_stride + head * in.head_dim, in.q_stride, pair.queries,
                         in.head_dim, in.scale);
      load_transposed<C>(douts, f.dout + query * out_stride + head * in.head_dim, out_stride, pair.queries,
                         in.head_dim, 1.0f);
      __syncthreads();
      float score[L::kEach][L::kEach], dp[L::kEach][L::kEach];
      multiply<C>(score, queries, keys, in.head_dim);
      multiply<C>(dp, douts, values, in.head_dim);
      differentiate<C>(score, dp, pair, f, query * in.heads + head, in.heads);
      store_tile<C>(p, score);
      store_tile<C>(ds, dp);
      __syncthreads();
      accumulate<C>(
          dv, [&](int i, int m) { return p[m * (L::kRows + 1) + ty * L::kEach + i]; }, douts);
      accumulate<C>(
          dk, [&](int i, int m) { return ds[m * (L::kRows + 1) + ty * L::kEach + i]; }, queries);
    }
  store_gradient<C, kAdd>(g.dk + key * g.dkv_stride + column, g.dkv_stride, dk, rows, in.head_dim, 1.0f);
  store_gradient<C, kAdd>(g.dv + key * g.dkv_stride + column, g.dkv_stride, dv, rows, in.head_dim, 1.0f);
}

}  // namespace

template <bool kAdd, class T, class Out>
void attend_backward(const Exec& ex, const AttentionGradients<T, Out>& gradients, const T* dout, const T* out,
                     const float* lse, const AttentionInputs<T>& in, std::int64_t tokens) {
  const std::int64_t rows = tokens * in.heads, sequences = tokens / in.seq_len;
  ScratchScope scope(*ex.scratch);
  auto* delta = ex.scratch->take({rows}, DType::kF32, "attention_backward deltas").as<float>();
  launch(ex, blocks_for(rows, kThreads / kWarp), kThreads, row_deltas<T>, delta, dout, out, rows,
         in.head_dim);
  const Forward<T> f{dout, lse, delta};
  with_head_columns(in.head_dim, [&](auto c) {
    using L = Tile<c.value>;
    const int tiles = in.tiles(L::kRows);
    launch_tiles(ex, 4 * L::kTransposed + L::kScores, sequences * in.heads * tiles,
                 query_gradient<c.value, kAdd, T, Out>, gradients, f, in);
    launch_tiles(ex, 4 * L::kTransposed + 2 * L::kScores, sequences * in.kv_heads * tiles,
                 key_gradients<c.value, kAdd, T, Out>, gradients, f, in);
  });
}

template void attend_backward<false>(const Exec&, const AttentionGradients<float, float>&, const float*,
                                     const float*, const float*, const AttentionInputs<float>&, std::int64_t);
template void attend_backward<false>(const Exec&, const AttentionGradients<bf16, bf16>&, const bf16*,
                                     const bf16*, const float*, const AttentionInputs<bf16>&, std::int64_t);
template void attend_backward<true>(const Exec&, const AttentionGradients<float, float>&, const float*,
                                    const float*, const float*, const AttentionInputs<float>&, std::int64_t);
template void attend_backward<true>(const Exec&, const AttentionGradients<bf16, float>&, const bf16*,
                                    const bf16*, const float*, const AttentionInputs<bf16>&, std::int64_t);

}  // namespace upmoe::cuda
