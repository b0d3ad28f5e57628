// Forward of causal attention: for each block of queries a running maximum and a running sum over the blocks
// of keys
// ("online softmax"), so that no more than one 64 x 64 tile of scores exists per thread.

#include "kernels/ops/attention.h"

#include <cmath>
#include <limits>

#include "kernels/cpu/attention_blocks.h"
#include "kernels/cpu/element_type.h"
#include "kernels/cpu/parallel_for.h"
#include "kernels/cpu/vector_math.h"
#include "kernels/ops/backend.h"

namespace upmoe::cpu {

namespace {

// The state of one block of queries while it walks over the keys.
struct Softmax {
  float* out;  // [kBlock, padded head_dim], not yet divided by `sum`
  std::int64_t padded;
  alignas(64) float max[kBlock];
  alignas(64) float sum[kBlock];
};

// Turns the scores of one block of keys into probabilities relative to the new maximum, and rescales what was
// summed before. A row that has seen no visible key yet keeps max = -inf and sum = 0.
void online_softmax(Softmax& state, float* scores, std::int64_t queries) {
  alignas(64) float reference[kBlock] = {}, rescale[kBlock];
  const float minus_infinity = -std::numeric_limits<float>::infinity();
  for (std::int64_t r = 0; r < queries; ++r) {
    f32x16 m = load(scores + r * kBlock);
    for (std::int64_t v = 1; v < kBlockVectors; ++v) m = max(m, load(scores + r * kBlock + v * kLanes));
    const float new_max = std::max(state.max[r], reduce_max(m));
    reference[r] = new_max == minus_infinity ? 0.0f : new_max;  // -inf - -inf would be NaN
  }
  for (std::int64_t v = 0; v < kBlock; v += kLanes)
    store(rescale + v, vector_exp(load(state.max + v) - load(reference + v)));
  for (std::int64_t r = 0; r < queries; ++r) {
    f32x16 sum{};
    for (std::int64_t v = 0; v < kBlockVectors; ++v) {
      float* s = scores + r * kBlock + v * kLanes;
      const f32x16 p = vector_exp(load(s) - reference[r]);
      store(s, p);
      sum += p;
    }
    state.sum[r] = state.sum[r] * rescale[r] + reduce_add(sum);
    if (state.sum[r] > 0) state.max[r] = reference[r];
    if (rescale[r] != 1.0f)
      for (std::int64_t d = 0; d < state.padded; d += kLanes)
        store(state.out + r * state.padded + d, load(state.out + r * state.padded + d) * rescale[r]);
  }
}

struct PackedKeys {
  const float* keys_DS;    // [blocks, head_dim, kBlock]
  const float* values_SD;  // [blocks, kBlock, padded]
};

// All keys that query block `query_block` can see. q: [kBlock, padded], scaled.
void attend(Softmax& state, const float* q, const PackedKeys& packed, std::int64_t query_block,
            const AttentionShape& shape, const std::int32_t* document_S) {
  alignas(64) float scores[kBlock * kBlock];
  std::fill_n(state.out, kBlock * state.padded, 0.0f);
  std::fill_n(state.max, kBlock, -std::numeric_limits<float>::infinity());
  std::fill_n(state.sum, kBlock, 0.0f);
  for (std::int64_t key_block = 0; key_block <= query_block; ++key_block) {
    const BlockPair pair = block_pair(query_block, key_block, shape.seq_len, document_S);
    const Documents documents = compare_documents(pair);
    if (documents == Documents::kDisjoint) continue;
    block_scores(scores, pair, documents, q, state.padded,
                 packed.keys_DS + key_block * kBlock * shape.head_dim, shape.head_dim);
    online_softmax(state, scores, pair.queries);
    const float* values_SD = packed.values_SD + key_block * kBlock * state.padded;
    const BlockProduct product{state.out,    state.padded, scores,       kBlock,   values_SD,
                               state.padded, pair.queries, state.padded, pair.keys};
    if (pair.diagonal) {
      block_product<false, true, Causal::kKeyDepth>(product);
    } else {
      block_product<false, true, Causal::kFull>(product);
    }
  }
}

template <class T>
void forward(Exec& ex, const TensorView& out_TQ, const TensorView& lse_TN, const ConstTensorView& qkv_TH,
             const AttentionShape& s, const std::int32_t* document) {
  const std::int64_t sequences = qkv_TH.shape[0] / s.seq_len, blocks = blocks_of(s.seq_len);
  const std::int64_t padded = round_to_lanes(s.head_dim), width = s.qkv_width();
  const std::int64_t key_size = blocks * kBlock * s.head_dim, value_size = blocks * kBlock * padded;
  ScratchScope scope(*ex.scratch);
  float* keys =
      ex.scratch->take({sequences * s.kv_heads, key_size}, DType::kF32, "attention keys").as<float>();
  float* values =
      ex.scratch->take({sequences * s.kv_heads, value_size}, DType::kF32, "attention values").as<float>();
  float* work =
      ex.scratch->take({worker_count(), 2 * kBlock * padded}, DType::kF32, "attention work").as<float>();
  const T* qkv = qkv_TH.as<T>();

  parallel_for(sequences * s.kv_heads * blocks, 2 * kBlock * s.head_dim, [&](std::int64_t i) {
    const std::int64_t block = i % blocks, head = i / blocks % s.kv_heads, sequence = i / blocks / s.kv_heads;
    const std::int64_t first = block * kBlock, rows = std::min(kBlock, s.seq_len - first);
    const T* key = qkv + (sequence * s.seq_len + first) * width + (s.heads + head) * s.head_dim;
    const std::int64_t pack = sequence * s.kv_heads + head;
    pack_columns(keys + pack * key_size + first * s.head_dim, key, width, rows, s.head_dim);
    pack_rows(values + pack * value_size + first * padded, padded, key + s.kv_heads * s.head_dim, width, rows,
              s.head_dim, 1.0f);
  });

  T* out = out_TQ.as<T>();
  float* lse = lse_TN.as<float>();
  const float scale = 1.0f / std::sqrt(static_cast<float>(s.head_dim));
  parallel_tasks(sequences * s.heads * blocks, [&](std::int64_t i, std::int64_t worker) {
    const std::int64_t block = i % blocks, head = i / blocks % s.heads, sequence = i / blocks / s.heads;
    const std::int64_t first = sequence * s.seq_len + block * kBlock;
    const std::int64_t rows = std::min(kBlock, s.seq_len - block * kBlock);
    const std::int64_t pack = sequence * s.kv_heads + head / (s.heads / s.kv_heads);
    float* q = work + worker * 2 * kBlock * padded;
    pack_rows(q, padded, qkv + first * width + head * s.head_dim, width, rows, s.head_dim, scale);
    Softmax state;
    state.out = q + kBlock * padded;
    state.padded = padded;
    attend(state, q, {keys + pack * key_size, values + pack * value_size}, block, s,
           document != nullptr ? document + sequence * s.seq_len : nullptr);
    for (std::int64_t r = 0; r < rows; ++r) {
      lse[(first + r) * s.heads + head] = state.max[r] + std::log(state.sum[r]);
      const float inverse = 1.0f / state.sum[r];
      for_lanes(s.head_dim, [&](std::int64_t d, auto lanes) {
        store(out + ((first + r) * s.heads + head) * s.head_dim + d,
              load(state.out + r * padded + d) * inverse, lanes);
      });
    }
  });
}

}  // namespace

void attention_forward(Exec& ex, TensorView out_TQ, TensorView lse_TN, ConstTensorView qkv_TH,
                       AttentionShape shape, const ConstTensorView* document_T) {
  with_float_type(qkv_TH.dtype, [&](auto type) {
    forward<decltype(type)>(ex, out_TQ, lse_TN, qkv_TH, shape,
                            document_T != nullptr ? document_T->as<std::int32_t>() : nullptr);
  });
}

}  // namespace upmoe::cpu
