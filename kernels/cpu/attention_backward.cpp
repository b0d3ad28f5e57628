// Backward of causal attention. The probabilities are computed again from the saved log-sum-exp; with
// delta = rowsum(dout * out) and p = exp(s - lse):
//   dv = p^T dout,  dp = dout v^T,  ds = p (dp - delta),  dq = scale ds k,  dk = ds^T (scale q).
// One task owns a sequence and a key/value head, and walks over its query heads and query blocks in order:
// the sums of dk and dv have one order and one writer, whatever the number of threads.

#include <cmath>

#include "kernels/cpu/attention_blocks.h"
#include "kernels/cpu/element_type.h"
#include "kernels/cpu/parallel_for.h"
#include "kernels/cpu/vector_math.h"
#include "kernels/ops/backend.h"

namespace upmoe::cpu {

namespace {

// One thread's memory. Blocks are kBlock rows; S is the sequence rounded up to blocks, P the padded head_dim.
struct Workspace {
  float *keys_DS, *values_DS;  // [blocks, head_dim, kBlock]
  float *keys_SP, *dkeys_SP, *dvalues_SP;
  float *q_P, *dout_P, *dq_P;  // [kBlock, P]

  static std::int64_t floats(std::int64_t blocks, std::int64_t padded) {
    return (5 * blocks + 3) * kBlock * padded;
  }

  Workspace(float* memory, std::int64_t blocks, std::int64_t padded) {
    const std::int64_t all = blocks * kBlock * padded, one = kBlock * padded;
    keys_DS = memory;
    values_DS = keys_DS + all;
    keys_SP = values_DS + all;
    dkeys_SP = keys_SP + all;
    dvalues_SP = dkeys_SP + all;
    q_P = dvalues_SP + all;
    dout_P = q_P + one;
    dq_P = dout_P + one;
  }
};

// In: masked scores and dp. Out: probabilities and ds.
void probability_gradient(float* scores, float* dp, const BlockPair& pair, const float* lse,
                          const float* delta) {
  for (std::int64_t r = 0; r < pair.queries; ++r) {
    float *p_r = scores + r * kBlock, *ds_r = dp + r * kBlock;
    const std::int64_t computed = pair.vectors(r);
    for (std::int64_t v = 0; v < computed; ++v) {
      const f32x16 p = vector_exp(load(p_r + v * kLanes) - lse[r]);
      store(p_r + v * kLanes, p);
      store(ds_r + v * kLanes, p * (load(ds_r + v * kLanes) - delta[r]));
    }
    std::fill_n(p_r + computed * kLanes, kBlock - computed * kLanes, 0.0f);
    std::fill_n(ds_r + computed * kLanes, kBlock - computed * kLanes, 0.0f);
  }
}

template <Causal kColumns, Causal kKeys, Causal kQueries>
void block_gradients(const Workspace& w, const BlockPair& pair, std::int64_t key_block, float* scores,
                     float* dp, const float* lse, const float* delta, std::int64_t head_dim,
                     std::int64_t padded) {
  const std::int64_t first = key_block * kBlock * padded;
  const float* values_DS = w.values_DS + key_block * kBlock * head_dim;
  block_product<false, false, kColumns>(
      {dp, kBlock, w.dout_P, padded, values_DS, kBlock, pair.queries, kBlock, head_dim});
  probability_gradient(scores, dp, pair, lse, delta);
  block_product<true, true, kQueries>(
      {w.dvalues_SP + first, padded, scores, kBlock, w.dout_P, padded, pair.keys, padded, pair.queries});
  block_product<true, true, kQueries>(
      {w.dkeys_SP + first, padded, dp, kBlock, w.q_P, padded, pair.keys, padded, pair.queries});
  block_product<false, true, kKeys>(
      {w.dq_P, padded, dp, kBlock, w.keys_SP + first, padded, pair.queries, padded, pair.keys});
}

// The gradients of one block of queries of one head; w.q_P and w.dout_P are packed.
void backward_block(const Workspace& w, std::int64_t query_block, const float* lse, const float* delta,
                    const AttentionShape& s, const std::int32_t* document_S) {
  alignas(64) float scores[kBlock * kBlock];
  alignas(64) float dp[kBlock * kBlock];
  const std::int64_t padded = round_to_lanes(s.head_dim);
  std::fill_n(w.dq_P, kBlock * padded, 0.0f);
  for (std::int64_t key_block = 0; key_block <= query_block; ++key_block) {
    const BlockPair pair = block_pair(query_block, key_block, s.seq_len, document_S);
    const Documents documents = compare_documents(pair);
    if (documents == Documents::kDisjoint) continue;
    block_scores(scores, pair, documents, w.q_P, padded, w.keys_DS + key_block * kBlock * s.head_dim,
                 s.head_dim);
    if (pair.diagonal) {
      block_gradients<Causal::kKeyColumns, Causal::kKeyDepth, Causal::kQueryDepth>(
          w, pair, key_block, scores, dp, lse, delta, s.head_dim, padded);
    } else {
      block_gradients<Causal::kFull, Causal::kFull, Causal::kFull>(w, pair, key_block, scores, dp, lse, delta,
                                                                   s.head_dim, padded);
    }
  }
}

template <class T>
void unpack_rows(T* dst, std::int64_t ldd, const float* src, std::int64_t lds, std::int64_t rows,
                 std::int64_t width, float scale) {
  for (std::int64_t r = 0; r < rows; ++r)
    for_lanes(width, [&](std::int64_t d, auto lanes) {
      store(dst + r * ldd + d, load(src + r * lds + d) * scale, lanes);
    });
}

// Tensors of one sequence.
template <class T>
struct Sequence {
  T* dqkv;
  const T *dout, *qkv, *out;
  const float* lse;
  const std::int32_t* document;  // or null
};

template <class T>
void backward_query_block(const Workspace& w, const Sequence<T>& seq, std::int64_t head, std::int64_t block,
                          const AttentionShape& s) {
  const std::int64_t first = block * kBlock, rows = std::min(kBlock, s.seq_len - first);
  const std::int64_t padded = round_to_lanes(s.head_dim), width = s.qkv_width(),
                     out_width = s.heads * s.head_dim;
  const std::int64_t q_at = first * width + head * s.head_dim, out_at = first * out_width + head * s.head_dim;
  const float scale = 1.0f / std::sqrt(static_cast<float>(s.head_dim));
  pack_rows(w.q_P, padded, seq.qkv + q_at, width, rows, s.head_dim, scale);
  pack_rows(w.dout_P, padded, seq.dout + out_at, out_width, rows, s.head_dim, 1.0f);
  float lse[kBlock], delta[kBlock];
  for (std::int64_t r = 0; r < rows; ++r) {
    lse[r] = seq.lse[(first + r) * s.heads + head];
    const T* out = seq.out + out_at + r * out_width;
    delta[r] = sum_lanes(s.head_dim, [&](std::int64_t d, auto lanes) {
      return load(w.dout_P + r * padded + d) * load(out + d, lanes);
    });
  }
  backward_block(w, block, lse, delta, s, seq.document);
  unpack_rows(seq.dqkv + q_at, width, w.dq_P, padded, rows, s.head_dim, scale);
}

template <class T>
void backward_kv_head(const Workspace& w, const Sequence<T>& seq, std::int64_t kv_head,
                      const AttentionShape& s) {
  const std::int64_t blocks = blocks_of(s.seq_len), padded = round_to_lanes(s.head_dim),
                     width = s.qkv_width();
  const std::int64_t key_at = (s.heads + kv_head) * s.head_dim, value_at = key_at + s.kv_heads * s.head_dim;
  for (std::int64_t block = 0; block < blocks; ++block) {
    const std::int64_t first = block * kBlock, rows = std::min(kBlock, s.seq_len - first);
    const T *key = seq.qkv + first * width + key_at, *value = seq.qkv + first * width + value_at;
    pack_columns(w.keys_DS + first * s.head_dim, key, width, rows, s.head_dim);
    pack_columns(w.values_DS + first * s.head_dim, value, width, rows, s.head_dim);
    pack_rows(w.keys_SP + first * padded, padded, key, width, rows, s.head_dim, 1.0f);
  }
  std::fill_n(w.dkeys_SP, blocks * kBlock * padded, 0.0f);
  std::fill_n(w.dvalues_SP, blocks * kBlock * padded, 0.0f);
  const std::int64_t group = s.heads / s.kv_heads;
  for (std::int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
    for (std::int64_t block = 0; block < blocks; ++block) backward_query_block(w, seq, head, block, s);
  unpack_rows(seq.dqkv + key_at, width, w.dkeys_SP, padded, s.seq_len, s.head_dim, 1.0f);
  unpack_rows(seq.dqkv + value_at, width, w.dvalues_SP, padded, s.seq_len, s.head_dim, 1.0f);
}

}  // namespace

void attention_backward(Exec& ex, TensorView dqkv_TH, ConstTensorView dout_TQ, ConstTensorView qkv_TH,
                        ConstTensorView out_TQ, ConstTensorView lse_TN, AttentionShape shape,
                        const ConstTensorView* document_T) {
  const std::int64_t sequences = qkv_TH.shape[0] / shape.seq_len, out_width = shape.heads * shape.head_dim;
  const std::int64_t blocks = blocks_of(shape.seq_len), padded = round_to_lanes(shape.head_dim);
  const std::int64_t floats = Workspace::floats(blocks, padded);
  ScratchScope scope(*ex.scratch);
  float* work = ex.scratch->take({worker_count(), floats}, DType::kF32, "attention_backward").as<float>();
  const std::int32_t* document = document_T != nullptr ? document_T->as<std::int32_t>() : nullptr;
  with_float_type(qkv_TH.dtype, [&](auto type) {
    using T = decltype(type);
    T* dqkv = dqkv_TH.as<T>();
    const T *dout = dout_TQ.as<T>(), *qkv = qkv_TH.as<T>(), *out = out_TQ.as<T>();
    const float* lse = lse_TN.as<float>();
    parallel_tasks(sequences * shape.kv_heads, [&](std::int64_t i, std::int64_t worker) {
      const std::int64_t t = i / shape.kv_heads * shape.seq_len;  // the sequence's first token
      const Sequence<T> seq{dqkv + t * shape.qkv_width(), dout + t * out_width,
                            qkv + t * shape.qkv_width(),  out + t * out_width,
                            lse + t * shape.heads,        document != nullptr ? document + t : nullptr};
      backward_kv_head(Workspace(work + worker * floats, blocks, padded), seq, i % shape.kv_heads, shape);
    });
  });
}

}  // namespace upmoe::cpu
