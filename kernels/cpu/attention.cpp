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

// One thread's memory: the keys and values of a sequence and head, and one block of queries.
struct Workspace {
  float* keys_DS;    // [blocks, head_dim, kBlock]
  float* values_SP;  // [blocks, kBlock, padded]
  float *q_P, *out_P;

  static std::int64_t floats(std::int64_t blocks, std::int64_t padded) {
    return (2 * blocks + 2) * kBlock * padded;
  }
  Workspace(float* memory, std::int64_t blocks, std::int64_t padded) {
    keys_DS = memory;
    values_SP = keys_DS + blocks * kBlock * padded;
    q_P = values_SP + blocks * kBlock * padded;
    out_P = q_P + kBlock * padded;
  }
};

// All keys that query block `query_block` can see; w.q_P is scaled.
void attend(Softmax& state, const Workspace& w, std::int64_t query_block, const AttentionShape& shape,
            const std::int32_t* document_S) {
  alignas(64) float scores[kBlock * kBlock];
  std::fill_n(state.out, kBlock * state.padded, 0.0f);
  std::fill_n(state.max, kBlock, -std::numeric_limits<float>::infinity());
  std::fill_n(state.sum, kBlock, 0.0f);
  for (std::int64_t key_block = 0; key_block <= query_block; ++key_block) {
    const BlockPair pair = block_pair(query_block, key_block, shape.seq_len, document_S);
    const Documents documents = compare_documents(pair);
    if (documents == Documents::kDisjoint) continue;
    block_scores(scores, pair, documents, w.q_P, state.padded,
                 w.keys_DS + key_block * kBlock * shape.head_dim, shape.head_dim);
    online_softmax(state, scores, pair.queries);
    const float* values_SP = w.values_SP + key_block * kBlock * state.padded;
    const BlockProduct product{state.out,    state.padded, scores,       kBlock,   values_SP,
                               state.padded, pair.queries, state.padded, pair.keys};
    if (pair.diagonal) {
      block_product<false, true, Causal::kKeyDepth>(product);
    } else {
      block_product<false, true, Causal::kFull>(product);
    }
  }
}

// Tensors of one sequence.
template <class T>
struct Sequence {
  T* out;
  float* lse;
  const T* qkv;
  const std::int32_t* document;  // or null
};

template <class T>
void pack_keys(const Workspace& w, const Sequence<T>& seq, std::int64_t kv_head, std::int64_t blocks,
               const AttentionShape& s) {
  const std::int64_t padded = round_to_lanes(s.head_dim), width = s.qkv_width();
  for (std::int64_t block = 0; block < blocks; ++block) {
    const std::int64_t first = block * kBlock, rows = std::min(kBlock, s.seq_len - first);
    const T* key = seq.qkv + first * width + (s.heads + kv_head) * s.head_dim;
    pack_columns(w.keys_DS + first * s.head_dim, key, width, rows, s.head_dim);
    pack_rows(w.values_SP + first * padded, padded, key + s.kv_heads * s.head_dim, width, rows, s.head_dim,
              1.0f);
  }
}

template <class T>
void forward_query_block(const Workspace& w, const Sequence<T>& seq, std::int64_t head, std::int64_t block,
                         const AttentionShape& s) {
  const std::int64_t first = block * kBlock, rows = std::min(kBlock, s.seq_len - first);
  const std::int64_t padded = round_to_lanes(s.head_dim), width = s.qkv_width();
  const float scale = 1.0f / std::sqrt(static_cast<float>(s.head_dim));
  pack_rows(w.q_P, padded, seq.qkv + first * width + head * s.head_dim, width, rows, s.head_dim, scale);
  Softmax state;
  state.out = w.out_P;
  state.padded = padded;
  attend(state, w, block, s, seq.document);
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::int64_t at = (first + r) * s.heads + head;
    seq.lse[at] = state.max[r] + std::log(state.sum[r]);
    const float inverse = 1.0f / state.sum[r];
    for_lanes(s.head_dim, [&](std::int64_t d, auto lanes) {
      store(seq.out + at * s.head_dim + d, load(state.out + r * padded + d) * inverse, lanes);
    });
  }
}

// How many tasks share the query blocks of one sequence and key/value head, each packing the keys it needs:
// one, unless there are too few sequences and heads to keep all threads busy. Every block's result is the
// same either way.
std::int64_t parts_of(std::int64_t sequences_and_heads, std::int64_t blocks) {
  const std::int64_t wanted = 4 * worker_count();
  if (sequences_and_heads == 0 || sequences_and_heads >= wanted) return 1;
  return std::min(blocks, (wanted + sequences_and_heads - 1) / sequences_and_heads);
}

template <class T>
void forward(Exec& ex, const TensorView& out_TQ, const TensorView& lse_TN, const ConstTensorView& qkv_TH,
             const AttentionShape& s, const std::int32_t* document) {
  const std::int64_t sequences = qkv_TH.shape[0] / s.seq_len, blocks = blocks_of(s.seq_len);
  const std::int64_t padded = round_to_lanes(s.head_dim), floats = Workspace::floats(blocks, padded);
  const std::int64_t group = s.heads / s.kv_heads, parts = parts_of(sequences * s.kv_heads, blocks);
  ScratchScope scope(*ex.scratch);
  float* work = ex.scratch->take({worker_count(), floats}, DType::kF32, "attention_forward").as<float>();
  T* out = out_TQ.as<T>();
  const T* qkv = qkv_TH.as<T>();
  float* lse = lse_TN.as<float>();
  parallel_tasks(sequences * s.kv_heads * parts, [&](std::int64_t i, std::int64_t worker) {
    const std::int64_t part = i % parts, kv_head = i / parts % s.kv_heads;
    const std::int64_t t = i / parts / s.kv_heads * s.seq_len;  // the sequence's first token
    const Sequence<T> seq{out + t * s.heads * s.head_dim, lse + t * s.heads, qkv + t * s.qkv_width(),
                          document != nullptr ? document + t : nullptr};
    const Workspace w(work + worker * floats, blocks, padded);
    const std::int64_t last = (blocks - 1 - part) / parts * parts + part;  // this part's last block
    pack_keys(w, seq, kv_head, last + 1, s);
    for (std::int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
      for (std::int64_t block = part; block < blocks; block += parts)
        forward_query_block(w, seq, head, block, s);
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
