// Attention with an online softmax: scores exist a tile at a time.

#include "kernels/cuda/portable/attention_softmax.cuh"
#include "kernels/cuda/portable/attention_tiles.cuh"

namespace upmoe::cuda {

namespace {

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
    store_query(out + row * in.head_dim, soft, i, in.head_dim);
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
  const TileMemory memory = tile_memory<C>();
  const int tiles = in.tiles(L::kRows);
  const Place at = place_of_block(tiles, in.heads);
  const std::int64_t first = at.sequence * in.seq_len;
  const int kv_column = at.head / in.group() * in.head_dim;
  Softmax<C> soft;
  soft.begin();
  load_transposed<C>(memory.queries,
                     in.q + (first + at.tile * L::kRows) * in.q_stride + at.head * in.head_dim, in.q_stride,
                     min(L::kRows, in.seq_len - at.tile * L::kRows), in.head_dim, in.scale);
  const int last = in.last_key_tile(at.tile, L::kRows);
  for (int tile = in.first_key_tile(at.tile, L::kRows); tile <= last; ++tile) {
    const TilePair pair = pair_of(in, at.sequence, at.tile, tile, L::kRows);
    if (!documents_meet(pair)) continue;
    const std::int64_t row = (first + tile * L::kRows) * in.kv_stride + kv_column;
    attend_keys(soft, RowsOf<T>{in.k + row, in.kv_stride}, RowsOf<T>{in.v + row, in.kv_stride}, pair, memory,
                in.head_dim);
  }
  store_rows<C>(out, lse, soft, in, at);
}

}  // namespace

template <class T, class Out>
void attend(const Exec& ex, Out* out, float* lse, const AttentionInputs<T>& in, std::int64_t tokens) {
  with_head_columns(in.head_dim, [&](auto c) {
    using L = Tile<c.value>;
    launch_tiles(ex, kTileFloats<c.value>, tokens / in.seq_len * in.heads * in.tiles(L::kRows),
                 attend_tile<c.value, T, Out>, out, lse, in);
  });
}

template void attend(const Exec&, float*, float*, const AttentionInputs<float>&, std::int64_t);
template void attend(const Exec&, bf16*, float*, const AttentionInputs<bf16>&, std::int64_t);
template void attend(const Exec&, float*, float*, const AttentionInputs<bf16>&, std::int64_t);

}  // namespace upmoe::cuda
