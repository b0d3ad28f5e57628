// A chunk of a prompt over what is kept of its row, a tile of queries by a tile of keys at a time.

#include "kernels/cuda/portable/attention_run.h"

#include <algorithm>
#include <cmath>

#include "kernels/cuda/portable/attention_softmax.cuh"

namespace upmoe::cuda {

namespace {

// The run's first token, and the cache's first row.
template <class T>
struct RunInputs {
  const T *q, *k, *v;
  const std::int32_t *row, *position;
  std::int64_t q_stride, kv_stride, slots;
  int tokens, heads, kv_heads, head_dim;
  int window;  // 0: none
  float scale;

  __device__ int tiles(int rows) const { return (tokens + rows - 1) / rows; }
};

// Keys of positions that follow each other, in the slots from `begin` on: behind the last slot comes the first. They
// are no more than there are slots.
template <class T>
struct RingRows {
  const T* slot_0;
  std::int64_t stride, begin, slots;
  __device__ const T* operator()(int r) const {
    const std::int64_t slot = begin + r;
    return slot_0 + (slot < slots ? slot : slot - slots) * stride;
  }
};

// One block: one tile of queries of one head, as in attention_forward.cu, against the keys from the first that its
// first query sees on. Tiles of keys begin at positions that slots have no part in, so a row's bits do not depend on
// the room that the cache has.
//
//   positions    | before, in the cache      | the run |      W = 10, B = 4: the first tile of queries, 16 to 19, sees
//                 7...                  15    16 .. 19        the keys 7 to 19, in tiles of 7 to 10, 11 to 14, 15 to
//                                                             18, and 19 alone
template <int C, class T>
__global__ void __launch_bounds__(kThreads) attend_run_tile(T* out, RunInputs<T> in) {
  using L = Tile<C>;
  const TileMemory memory = tile_memory<C>();
  const Place at = place_of_block(in.tiles(L::kRows), in.heads);
  const int query = at.tile * L::kRows, queries = min(L::kRows, in.tokens - query);
  const int position = *in.position + query, last = position + queries - 1;
  const std::int64_t kept = *in.row * in.slots * in.kv_stride +
                            static_cast<std::int64_t>(at.head / (in.heads / in.kv_heads)) * in.head_dim;
  Softmax<C> soft;
  soft.begin();
  load_transposed<C>(memory.queries, in.q + query * in.q_stride + at.head * in.head_dim, in.q_stride, queries,
                     in.head_dim, in.scale);
  for (int key = in.window == 0 ? 0 : max(0, position - in.window + 1); key <= last; key += L::kRows) {
    const int ahead = position - key;  // of the first query to the first key
    const TilePair pair{queries,
                        min(L::kRows, last + 1 - key),
                        in.window > 0 ? ahead - in.window + 1 : -L::kRows,
                        ahead,
                        nullptr,
                        nullptr};
    const std::int64_t slot = key % in.slots;
    attend_keys(soft, RingRows<T>{in.k + kept, in.kv_stride, slot, in.slots},
                RingRows<T>{in.v + kept, in.kv_stride, slot, in.slots}, pair, memory, in.head_dim);
  }
  const int first = static_cast<int>(threadIdx.x) / kSide * L::kEach;
#pragma unroll
  for (int i = 0; i < L::kEach; ++i)
    if (first + i < queries)
      store_query(out + (static_cast<std::int64_t>(query + first + i) * in.heads + at.head) * in.head_dim,
                  soft, i, in.head_dim);
}

}  // namespace

namespace portable {

void attend_run(Exec& ex, TensorView out_TQ, ConstTensorView qkv_TH, const KeyCache& cache,
                const CachedTokens& tokens, const AttentionShape& shape) {
  with_float_type(qkv_TH.dtype, [&](auto type) {
    using T = decltype(type);
    const RunInputs<T> in{.q = qkv_TH.as<T>(),
                          .k = ConstTensorView(cache.k_BSK).as<T>(),
                          .v = ConstTensorView(cache.v_BSK).as<T>(),
                          .row = tokens.row_T.as<std::int32_t>(),
                          .position = tokens.position_T.as<std::int32_t>(),
                          .q_stride = shape.qkv_width(),
                          .kv_stride = shape.kv_heads * shape.head_dim,
                          .slots = cache.k_BSK.shape[1],
                          .tokens = static_cast<int>(tokens.run),
                          .heads = static_cast<int>(shape.heads),
                          .kv_heads = static_cast<int>(shape.kv_heads),
                          .head_dim = static_cast<int>(shape.head_dim),
                          .window = static_cast<int>(std::min<std::int64_t>(shape.window, 1 << 30)),
                          .scale = 1.0f / std::sqrt(static_cast<float>(shape.head_dim))};
    with_head_columns(shape.head_dim, [&](auto c) {
      constexpr int kRows = Tile<c.value>::kRows;
      launch_tiles(ex, kTileFloats<c.value>, shape.heads * ((tokens.run + kRows - 1) / kRows),
                   attend_run_tile<c.value, T>, out_TQ.as<T>(), in);
    });
  });
  const TensorView others = out_TQ.rows(tokens.run, out_TQ.rows());
  if (others.elements() > 0) check(cudaMemsetAsync(others.data, 0, others.bytes(), stream_of(ex).raw()));
}

}  // namespace portable

}  // namespace upmoe::cuda
