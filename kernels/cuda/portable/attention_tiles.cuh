#pragma once
// What the attention kernels share. A block of 256 threads works on tiles of B queries by B keys, in fp32: 16
// by 16 threads, each with B / 16 queries and as many keys of a tile of scores, or C columns of a head. Tiles
// lie transposed in shared memory, [head_dim][B + 4], so that a product reads four values at once.

#include "kernels/cuda/runtime/launch.cuh"
#include "kernels/ops/attention.h"

namespace upmoe::cuda {

constexpr int kSide = 16;  // threads along each side of a tile

// Head size up to 16 C; larger heads take smaller tiles, for shared memory.
template <int C>
struct Tile {
  static constexpr int kWidth = kSide * C;
  static constexpr int kRows = C > 8 ? 32 : 64;  // B
  static constexpr int kEach = kRows / kSide;
  static constexpr int kStride = kRows + 4;
  static constexpr int kTransposed = kWidth * kStride;  // floats of a transposed tile
  static constexpr int kScores = kRows * (kRows + 1);   // floats of a tile of scores
};

// One head of queries against one of keys and values; rows of a sequence follow each other.
template <class T>
struct AttentionInputs {
  const T *q, *k, *v;
  std::int64_t q_stride, kv_stride;
  const std::int32_t *query_document, *key_document;  // null without documents
  int seq_len, heads, kv_heads, head_dim;
  bool causal;  // queries and keys are the same tokens; else all keys come before all queries
  int ahead;    // query i sees keys k > i + ahead - window; window 0: all of them
  int window;
  float scale;

  __device__ int group() const { return heads / kv_heads; }
  __host__ __device__ int tiles(int rows) const { return (seq_len + rows - 1) / rows; }
  // The tiles of keys that a tile of queries can see are [first, last]; none where first > last.
  __device__ int first_key_tile(int query_tile, int rows) const {
    return window == 0 ? 0 : max(0, query_tile * rows + ahead - window + 1) / rows;
  }
  __device__ int last_key_tile(int query_tile, int rows) const {
    return causal ? query_tile : tiles(rows) - 1;
  }
  // The other way round: the last key of the tile is seen by queries up to it + window - 1 - ahead.
  __device__ int first_query_tile(int key_tile) const { return causal ? key_tile : 0; }
  __device__ int last_query_tile(int key_tile, int rows) const {
    const int last = tiles(rows) - 1;
    if (window == 0) return last;
    const int query = min(seq_len, (key_tile + 1) * rows) - 1 + window - 1 - ahead;
    return query < 0 ? -1 : min(last, query / rows);
  }
};

// Which tile, head and sequence a block has. Tiles with the most work set out first.
struct Place {
  int tile, head;
  std::int64_t sequence;
};
__device__ inline Place place_of_block(int tiles, int heads) {
  const std::int64_t rest = blockIdx.x / tiles;
  return {tiles - 1 - static_cast<int>(blockIdx.x % tiles), static_cast<int>(rest % heads), rest / heads};
}

// Where the rows of a tile lie: one `stride` behind the other.
template <class T>
struct RowsOf {
  const T* first;
  std::int64_t stride;
  __device__ const T* operator()(int r) const { return first + r * stride; }
};

// dst[d][r] = row(r)[d] * scale; zeros behind the last row and the last element of a head.
template <int C, class Row>
__device__ void load_transposed(float* dst, const Row& row, int rows, int head_dim, float scale) {
  using L = Tile<C>;
  for (int i = static_cast<int>(threadIdx.x); i < L::kRows * L::kWidth; i += kThreads) {
    const int r = i / L::kWidth, d = i % L::kWidth;
    dst[d * L::kStride + r] = r < rows && d < head_dim ? to_float(row(r)[d]) * scale : 0.0f;
  }
}
template <int C, class T>
__device__ void load_transposed(float* dst, const T* src, std::int64_t stride, int rows, int head_dim,
                                float scale) {
  load_transposed<C>(dst, RowsOf<T>{src, stride}, rows, head_dim, scale);
}

// product[i][j] = sum over d of a[d][row i] b[d][column j].
template <int C>
__device__ void multiply(float (&product)[Tile<C>::kEach][Tile<C>::kEach], const float* a, const float* b,
                         int head_dim) {
  using L = Tile<C>;
  constexpr int R = L::kEach;
  const int ty = static_cast<int>(threadIdx.x) / kSide, tx = static_cast<int>(threadIdx.x) % kSide;
#pragma unroll
  for (int i = 0; i < R; ++i)
#pragma unroll
    for (int j = 0; j < R; ++j) product[i][j] = 0;
  for (int d = 0; d < head_dim; ++d) {
    float left[R], right[R];
    load_floats(left, a + d * L::kStride + ty * R);
    load_floats(right, b + d * L::kStride + tx * R);
#pragma unroll
    for (int i = 0; i < R; ++i)
#pragma unroll
      for (int j = 0; j < R; ++j) product[i][j] += left[i] * right[j];
  }
}

// One tile of queries against one of keys.
struct TilePair {
  int queries, keys;  // how many
  int begin, last;    // query q sees the keys q + begin to q + last
  const std::int32_t *query_document, *key_document;
  __device__ bool sees(int q, int k) const {
    return q < queries && k < keys && k <= q + last && k >= q + begin &&
           (query_document == nullptr || query_document[q] == key_document[k]);
  }
};

template <class T>
__device__ TilePair pair_of(const AttentionInputs<T>& in, std::int64_t sequence, int query_tile, int key_tile,
                            int rows) {
  const std::int64_t q = sequence * in.seq_len + query_tile * rows,
                     k = sequence * in.seq_len + key_tile * rows;
  const bool documents = in.query_document != nullptr;
  return {min(rows, in.seq_len - query_tile * rows),
          min(rows, in.seq_len - key_tile * rows),
          in.window > 0 ? (query_tile - key_tile) * rows + in.ahead - in.window + 1 : -rows,
          in.causal && query_tile == key_tile ? 0 : rows,
          documents ? in.query_document + q : nullptr,
          documents ? in.key_document + k : nullptr};
}

// The least and the largest of n ids, in every lane of a warp.
__device__ inline void range_of(const std::int32_t* id, int n, int& least, int& largest) {
  least = 0x7fffffff;
  largest = -0x7fffffff;
  for (int i = static_cast<int>(threadIdx.x) % kWarp; i < n; i += kWarp) {
    least = min(least, id[i]);
    largest = max(largest, id[i]);
  }
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    least = min(least, __shfl_xor_sync(kAllLanes, least, lanes));
    largest = max(largest, __shfl_xor_sync(kAllLanes, largest, lanes));
  }
}

// Whether the tiles can share a document, judged by the ranges of their ids; the same answer in every thread.
__device__ inline bool documents_meet(const TilePair& pair) {
  if (pair.query_document == nullptr) return true;
  int q_least, q_largest, k_least, k_largest;
  range_of(pair.query_document, pair.queries, q_least, q_largest);
  range_of(pair.key_document, pair.keys, k_least, k_largest);
  return q_least <= k_largest && k_least <= q_largest;
}

// acc[i][c] += sum over m of weight(row i, m) * tile[column][m]: rows of this thread, columns tx + 16 c.
template <int C, class Weight>
__device__ void accumulate(float (&acc)[Tile<C>::kEach][C], const Weight& weight, const float* transposed) {
  using L = Tile<C>;
  const int tx = static_cast<int>(threadIdx.x) % kSide;
  for (int m = 0; m < L::kRows; ++m) {
    float w[L::kEach];
#pragma unroll
    for (int i = 0; i < L::kEach; ++i) w[i] = weight(i, m);
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const float x = transposed[(tx + kSide * c) * L::kStride + m];
#pragma unroll
      for (int i = 0; i < L::kEach; ++i) acc[i][c] += w[i] * x;
    }
  }
}

// body(std::integral_constant<int, C>) for the head size.
template <class Body>
void with_head_columns(std::int64_t head_dim, Body&& body) {
  if (head_dim <= 64) return body(std::integral_constant<int, 4>{});
  if (head_dim <= 128) return body(std::integral_constant<int, 8>{});
  UPMOE_CHECK(head_dim <= 256, "head_dim {}, at most 256 on a GPU", head_dim);
  body(std::integral_constant<int, 16>{});
}

template <class... Parameters, class... Arguments>
void launch_tiles(const Exec& ex, int floats, std::int64_t blocks, void (*kernel)(Parameters...),
                  Arguments&&... arguments) {
  const std::size_t bytes = static_cast<std::size_t>(floats) * sizeof(float);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
  launch_shared(ex, bytes, static_cast<unsigned>(blocks), kThreads, kernel,
                std::forward<Arguments>(arguments)...);
}

// The whole of attention on these tensors: self-attention's, and a pair of chunks'. Defined in
// attention_forward.cu and attention_backward.cu for what attention.cu asks for.
template <class T, class Out>
void attend(const Exec& ex, Out* out, float* lse, const AttentionInputs<T>& in, std::int64_t tokens);

template <class T, class Out>
struct AttentionGradients {
  Out *dq, *dk, *dv;
  std::int64_t dq_stride, dkv_stride;
};
template <bool kAdd, class T, class Out>
void attend_backward(const Exec& ex, const AttentionGradients<T, Out>& gradients, const T* dout, const T* out,
                     const float* lse, const AttentionInputs<T>& in, std::int64_t tokens);

}  // namespace upmoe::cuda
