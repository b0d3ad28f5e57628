// One block of four warps, one token and head. A step of generation reads every key and value once; it has a few
// products for each, and is bound by memory.

#include "kernels/cuda/portable/attention_decode.h"

#include <algorithm>
#include <cmath>

#include "kernels/cuda/runtime/launch.cuh"
#include "kernels/ops/backend.h"

namespace upmoe::cuda {

namespace {

constexpr int kDecodeWarps = 4;
constexpr int kMostColumns = 8;  // of a lane: heads of up to 256

struct Places {
  const std::int32_t *row, *position;
  std::int64_t slots;
  int window;
  // Of the first key that is seen.
  __device__ int first(int last) const { return window == 0 ? 0 : max(0, last - window + 1); }
  __device__ std::int64_t slot(std::int64_t t, int p) const { return row[t] * slots + p % slots; }
};

// `keys` are those of token 0; its values lie `width` behind them. One block, one token.
template <class T>
__global__ void store_rows(T* k, T* v, const T* keys, std::int64_t stride, std::int64_t width, Places at) {
  const std::int64_t t = blockIdx.x;
  if (at.row[t] < 0) return;
  const std::int64_t slot = at.slot(t, at.position[t]);
  for (std::int64_t i = threadIdx.x; i < width; i += kThreads) {
    k[slot * width + i] = keys[t * stride + i];
    v[slot * width + i] = keys[t * stride + width + i];
  }
}

struct Heads {
  int heads, kv_heads, dim;
  std::int64_t stride;  // of a token's row of qkv
  float scale;
};

// Warp w takes the keys first + w, first + w + 4, ...; lane l of it the columns l, l + 32, ... of a head. Each has a
// softmax of its own keys; the four are joined in their order.
template <class T>
__global__ void __launch_bounds__(kDecodeWarps* kWarp)
    attend_row(T* out, const T* qkv, const T* k, const T* v, Heads h, Places at) {
  __shared__ float largest[kDecodeWarps], sums[kDecodeWarps], parts[kDecodeWarps][kMostColumns * kWarp];
  const std::int64_t t = blockIdx.x / h.heads;
  const int head = static_cast<int>(blockIdx.x % h.heads), lane = static_cast<int>(threadIdx.x) % kWarp,
            warp = static_cast<int>(threadIdx.x) / kWarp;
  const std::int64_t width = static_cast<std::int64_t>(h.kv_heads) * h.dim,
                     column = static_cast<std::int64_t>(head / (h.heads / h.kv_heads)) * h.dim;
  const bool none = at.row[t] < 0;
  const int last = at.position[t];
  float q[kMostColumns], sum_of_values[kMostColumns], most = -INFINITY, sum = 0;
#pragma unroll
  for (int c = 0; c < kMostColumns; ++c) {
    const int d = c * kWarp + lane;
    q[c] = d < h.dim ? to_float(qkv[t * h.stride + head * h.dim + d]) * h.scale : 0.0f;
    sum_of_values[c] = 0;
  }
  for (int p = none ? last + 1 : at.first(last) + warp; p <= last; p += kDecodeWarps) {
    const std::int64_t row = at.slot(t, p) * width + column;
    float product = 0;
#pragma unroll
    for (int c = 0; c < kMostColumns; ++c) {
      const int d = c * kWarp + lane;
      if (d < h.dim) product += q[c] * to_float(k[row + d]);
    }
    const float score = warp_sum(product), now = fmaxf(most, score);
    const float before = expf(most - now), weight = expf(score - now);
    sum = sum * before + weight;
    most = now;
#pragma unroll
    for (int c = 0; c < kMostColumns; ++c) {
      const int d = c * kWarp + lane;
      if (d < h.dim) sum_of_values[c] = sum_of_values[c] * before + weight * to_float(v[row + d]);
    }
  }
#pragma unroll
  for (int c = 0; c < kMostColumns; ++c) parts[warp][c * kWarp + lane] = sum_of_values[c];
  if (lane == 0) {
    largest[warp] = most;
    sums[warp] = sum;
  }
  __syncthreads();
  float all = -INFINITY, whole = 0;
  for (int w = 0; w < kDecodeWarps; ++w) all = fmaxf(all, largest[w]);
  for (int w = 0; w < kDecodeWarps; ++w)
    if (sums[w] > 0) whole += sums[w] * expf(largest[w] - all);
  for (int d = static_cast<int>(threadIdx.x); d < h.dim; d += kDecodeWarps * kWarp) {
    float value = 0;
    for (int w = 0; w < kDecodeWarps; ++w)
      if (sums[w] > 0) value += parts[w][d] * expf(largest[w] - all);
    out[(t * h.heads + head) * h.dim + d] = from_float<T>(whole > 0 ? value / whole : 0.0f);
  }
}

Places places_in(const KeyCache& cache, const CachedTokens& tokens, const AttentionShape& shape) {
  return {tokens.row_T.as<std::int32_t>(), tokens.position_T.as<std::int32_t>(), cache.k_BSK.shape[1],
          static_cast<int>(std::min<std::int64_t>(shape.window, 1 << 30))};
}

}  // namespace

void store_keys(Exec& ex, const KeyCache& cache, ConstTensorView qkv_TH, const CachedTokens& tokens,
                AttentionShape shape) {
  with_float_type(qkv_TH.dtype, [&](auto type) {
    using T = decltype(type);
    launch(ex, static_cast<unsigned>(qkv_TH.rows()), kThreads, store_rows<T>, cache.k_BSK.as<T>(),
           cache.v_BSK.as<T>(), qkv_TH.as<T>() + shape.heads * shape.head_dim, shape.qkv_width(),
           shape.kv_heads * shape.head_dim, places_in(cache, tokens, shape));
  });
}

namespace portable {

void attend_tokens(Exec& ex, TensorView out_TQ, ConstTensorView qkv_TH, const KeyCache& cache,
                   const CachedTokens& tokens, const AttentionShape& shape) {
  UPMOE_CHECK(shape.head_dim <= kMostColumns * kWarp, "head_dim {}, at most {} on a GPU", shape.head_dim,
              kMostColumns * kWarp);
  const Heads heads{static_cast<int>(shape.heads), static_cast<int>(shape.kv_heads),
                    static_cast<int>(shape.head_dim), shape.qkv_width(),
                    1.0f / std::sqrt(static_cast<float>(shape.head_dim))};
  with_float_type(qkv_TH.dtype, [&](auto type) {
    using T = decltype(type);
    launch(ex, static_cast<unsigned>(qkv_TH.rows() * shape.heads), kDecodeWarps * kWarp, attend_row<T>,
           out_TQ.as<T>(), qkv_TH.as<T>(), ConstTensorView(cache.k_BSK).as<T>(),
           ConstTensorView(cache.v_BSK).as<T>(), heads, places_in(cache, tokens, shape));
  });
}

}  // namespace portable

}  // namespace upmoe::cuda
