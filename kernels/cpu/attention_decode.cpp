// One token and one key/value head at a time, with all the query heads that read it: a key is loaded once for them. A
// run of many tokens goes by blocks (attention.cpp), where a key is loaded once for 64 of them.

#include "kernels/ops/attention_decode.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <span>

#include "kernels/cpu/attention_blocks.h"
#include "kernels/cpu/attention_run.h"
#include "kernels/cpu/parallel_for.h"
#include "kernels/cpu/vector_math.h"
#include "kernels/ops/backend.h"

namespace upmoe::cpu {

namespace {

// The keys and values of one row and key/value head; position p lies `p mod slots` rows of `width` behind the first.
template <class T>
struct KeptHead {
  const T *k, *v;
  std::int64_t slots, width;
  std::int64_t at(std::int64_t position) const { return position % slots * width; }
};

// One thread's memory: queries, what they have summed, and the scores of kBlock keys, for each head of a group.
struct Group {
  std::int64_t heads, dim, padded;
  float *q_GP, *out_GP, *scores_GB, *max_G, *sum_G;

  static std::int64_t floats(std::int64_t heads, std::int64_t padded) {
    return heads * (2 * padded + kBlock + 2);
  }
  Group(float* memory, const AttentionShape& s)
      : heads(s.heads / s.kv_heads), dim(s.head_dim), padded(round_to_lanes(s.head_dim)) {
    q_GP = memory;
    out_GP = q_GP + heads * padded;
    scores_GB = out_GP + heads * padded;
    max_G = scores_GB + heads * kBlock;
    sum_G = max_G + heads;
  }
  void reset() const {
    std::fill_n(out_GP, heads * padded, 0.0f);
    std::fill_n(max_G, heads, -std::numeric_limits<float>::infinity());
    std::fill_n(sum_G, heads, 0.0f);
  }
};

// Of `n` keys from position `first` on; those behind them are seen by nobody.
template <class T>
void score_keys(const Group& g, const KeptHead<T>& kept, std::int64_t first, std::int64_t n) {
  for (std::int64_t i = 0; i < n; i += kLanes) {
    const T* keys[kLanes];  // those behind the last are the last again
    for (std::int64_t j = 0; j < kLanes; ++j) keys[j] = kept.k + kept.at(first + std::min(i + j, n - 1));
    for (std::int64_t head = 0; head < g.heads; ++head) {
      f32x16 products[kLanes] = {};
      for (std::int64_t j = 0; j < kLanes; ++j)
        for_lanes(g.dim, [&](std::int64_t d, auto lanes) {
          products[j] += load(g.q_GP + head * g.padded + d) * load(keys[j] + d, lanes);
        });
      store(g.scores_GB + head * kBlock + i, reduce_add_each(products));
    }
  }
  for (std::int64_t head = 0; head < g.heads; ++head)
    std::fill_n(g.scores_GB + head * kBlock + n, kBlock - n, -std::numeric_limits<float>::infinity());
}

// As the forward over whole sequences has it (attention.cpp): scores become probabilities relative to the largest so
// far, and what was summed before is scaled to it. Every block has a key that is seen.
void update_softmax(const Group& g) {
  for (std::int64_t head = 0; head < g.heads; ++head) {
    float* scores = g.scores_GB + head * kBlock;
    f32x16 most = load(scores);
    for (std::int64_t i = kLanes; i < kBlock; i += kLanes) most = max(most, load(scores + i));
    const float largest = std::max(g.max_G[head], reduce_max(most)),
                before = g.sum_G[head] > 0 ? std::exp(g.max_G[head] - largest) : 0.0f;
    f32x16 sum{};
    for (std::int64_t i = 0; i < kBlock; i += kLanes) {
      const f32x16 p = vector_exp(load(scores + i) - largest);
      store(scores + i, p);
      sum += p;
    }
    g.sum_G[head] = g.sum_G[head] * before + reduce_add(sum);
    g.max_G[head] = largest;
    if (before == 1.0f) continue;
    for (std::int64_t d = 0; d < g.padded; d += kLanes)
      store(g.out_GP + head * g.padded + d, load(g.out_GP + head * g.padded + d) * before);
  }
}

// kVectors of outputs from d on stay in registers while all values go by.
template <int kVectors, class T, class Lanes>
void add_weighed(float* out, const float* weights, std::span<const T* const> values, std::int64_t d,
                 Lanes lanes) {
  f32x16 sum[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) sum[v] = load(out + d + v * kLanes);
  for (std::size_t i = 0; i < values.size(); ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[v] += load(values[i] + d + v * kLanes, lanes) * weights[i];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) store(out + d + v * kLanes, sum[v]);
}

template <class T>
void add_values(const Group& g, const KeptHead<T>& kept, std::int64_t first, std::int64_t n) {
  constexpr int kAtOnce = 4;
  const T* values[kBlock];
  for (std::int64_t i = 0; i < n; ++i) values[i] = kept.v + kept.at(first + i);
  const std::span<const T* const> seen(values, static_cast<std::size_t>(n));
  for (std::int64_t head = 0; head < g.heads; ++head) {
    float* out = g.out_GP + head * g.padded;
    const float* weights = g.scores_GB + head * kBlock;
    std::int64_t d = 0;
    for (; d + kAtOnce * kLanes <= g.dim; d += kAtOnce * kLanes)
      add_weighed<kAtOnce>(out, weights, seen, d, AllLanes{});
    for_lanes(g.dim - d,
              [&](std::int64_t rest, auto lanes) { add_weighed<1>(out, weights, seen, d + rest, lanes); });
  }
}

template <class T>
void attend_token(const Group& g, T* out, const T* q, const KeptHead<T>& kept, std::int64_t position,
                  std::int64_t window) {
  const float scale = 1.0f / std::sqrt(static_cast<float>(g.dim));
  pack_scaled(g.q_GP, g.padded, q, g.dim, g.heads, g.dim, scale);
  g.reset();
  for (std::int64_t first = window > 0 ? std::max<std::int64_t>(0, position - window + 1) : 0;
       first <= position; first += kBlock) {
    const std::int64_t n = std::min(kBlock, position + 1 - first);
    score_keys(g, kept, first, n);
    update_softmax(g);
    add_values(g, kept, first, n);
  }
  for (std::int64_t head = 0; head < g.heads; ++head) {
    const float inverse = 1.0f / g.sum_G[head];
    for_lanes(g.dim, [&](std::int64_t d, auto lanes) {
      store(out + head * g.dim + d, load(g.out_GP + head * g.padded + d) * inverse, lanes);
    });
  }
}

// Before the loops, whose bodies must not throw.
void check_room(const KeyCache& cache, const CachedTokens& tokens, std::int64_t window) {
  const std::int64_t rows = cache.k_BSK.shape[0], slots = cache.k_BSK.shape[1];
  const auto *row = tokens.row_T.as<std::int32_t>(), *position = tokens.position_T.as<std::int32_t>();
  // A slot is written again when nobody sees its key any more.
  const bool turns = window > 0 && window <= slots;
  for (std::int64_t t = 0; t < tokens.row_T.elements(); ++t)
    UPMOE_CHECK(row[t] < rows && (row[t] < 0 || (position[t] >= 0 && (turns || position[t] < slots))),
                "token {}: position {} of row {}, in a cache of {} rows of {} slots", t, position[t], row[t],
                rows, slots);
}

void check_run(const CachedTokens& tokens) {
  const auto *row = tokens.row_T.as<std::int32_t>(), *position = tokens.position_T.as<std::int32_t>();
  for (std::int64_t t = 0; t < tokens.row_T.elements(); ++t)
    UPMOE_CHECK(
        t < tokens.run ? row[t] >= 0 && row[t] == row[0] && position[t] == position[0] + t : row[t] < 0,
        "token {}: position {} of row {} in a run of {} from position {} of row {} on", t, position[t],
        row[t], tokens.run, position[0], row[0]);
}

// Fewer tokens than this go one by one: blocks of keys are packed first, which that many make up for.
constexpr std::int64_t kBlocksFrom = 16;

}  // namespace

void store_keys(Exec&, const KeyCache& cache, ConstTensorView qkv_TH, const CachedTokens& tokens,
                AttentionShape shape) {
  check_room(cache, tokens, shape.window);
  const std::int64_t slots = cache.k_BSK.shape[1], width = shape.kv_heads * shape.head_dim;
  const auto *row = tokens.row_T.as<std::int32_t>(), *position = tokens.position_T.as<std::int32_t>();
  with_float_type(qkv_TH.dtype, [&](auto type) {
    using T = decltype(type);
    const T* keys = qkv_TH.as<T>() + shape.heads * shape.head_dim;
    T *k = cache.k_BSK.as<T>(), *v = cache.v_BSK.as<T>();
    parallel_for(qkv_TH.rows(), 2 * width, [&](std::int64_t t) {
      if (row[t] < 0) return;
      const std::int64_t slot = row[t] * slots + position[t] % slots;
      const T* from = keys + t * shape.qkv_width();
      std::copy_n(from, width, k + slot * width);
      std::copy_n(from + width, width, v + slot * width);
    });
  });
}

void attention_decode(Exec& ex, TensorView out_TQ, ConstTensorView qkv_TH, const KeyCache& cache,
                      const CachedTokens& tokens, AttentionShape shape) {
  check_room(cache, tokens, shape.window);
  if (tokens.run > 0) check_run(tokens);
  if (tokens.run >= kBlocksFrom) {
    attend_run(ex, out_TQ, qkv_TH, cache, tokens, shape);
    const TensorView others = out_TQ.rows(tokens.run, out_TQ.rows());
    std::memset(others.data, 0, static_cast<std::size_t>(others.elements()) * size_of(others.dtype));
    return;
  }
  const std::int64_t slots = cache.k_BSK.shape[1], width = shape.kv_heads * shape.head_dim;
  const std::int64_t group = shape.heads / shape.kv_heads * shape.head_dim, Q = shape.heads * shape.head_dim;
  const auto *row = tokens.row_T.as<std::int32_t>(), *position = tokens.position_T.as<std::int32_t>();
  ScratchScope scope(*ex.scratch);
  const std::int64_t floats = Group::floats(shape.heads / shape.kv_heads, round_to_lanes(shape.head_dim));
  float* work = ex.scratch->take({worker_count(), floats}, DType::kF32, "attention_decode").as<float>();
  with_float_type(qkv_TH.dtype, [&](auto type) {
    using T = decltype(type);
    const T *qkv = qkv_TH.as<T>(), *k = cache.k_BSK.as<T>(), *v = cache.v_BSK.as<T>();
    T* all_out = out_TQ.as<T>();
    parallel_tasks(qkv_TH.rows() * shape.kv_heads, [&](std::int64_t i, std::int64_t worker) {
      const std::int64_t t = i / shape.kv_heads, head = i % shape.kv_heads;
      T* out = all_out + t * Q + head * group;
      if (row[t] < 0) {
        std::fill_n(out, group, from_float<T>(0.0f));
        return;
      }
      const std::int64_t first = row[t] * slots * width + head * shape.head_dim;
      attend_token(Group(work + worker * floats, shape), out, qkv + t * shape.qkv_width() + head * group,
                   KeptHead<T>{k + first, v + first, slots, width}, position[t], shape.window);
    });
  });
}

}  // namespace upmoe::cpu
