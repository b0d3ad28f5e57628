// Backward of causal attention. The probabilities are computed again from the saved log-sum-exp; with
// delta = rowsum(dout * out) and p = exp(s - lse):
//   dv = p^T dout,  dp = dout v^T,  ds = p (dp - delta),  dq = scale ds k,  dk = ds^T (scale q).
// One task owns a sequence and a key/value head, and walks over its query heads and query blocks in order:
// the sums of dk and dv have one order and one writer, whatever the number of threads.

#include <cmath>

#include "kernels/cpu/attention_blocks.h"
#include "kernels/cpu/parallel_for.h"
#include "kernels/cpu/vector_math.h"
#include "kernels/ops/backend.h"

namespace upmoe::cpu {

namespace {

// One thread's memory. Blocks are kBlock rows; S is the sequence rounded up to blocks, P the padded head_dim. Keys
// stand here twice, because the two products with them sum over different indices: q k^T over head_dim, which takes
// keys_DS, and ds k over keys, which takes keys_SP. Values are in a product of the first kind only.
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
    // The rest of a diagonal row was not computed; the products read parts of it, as tiles do not end on the diagonal.
    std::fill_n(p_r + computed * kLanes, kBlock - computed * kLanes, 0.0f);
    std::fill_n(ds_r + computed * kLanes, kBlock - computed * kLanes, 0.0f);
  }
}

// Five products of 64 x 64 tiles, scores among them (block_scores). On the diagonal each leaves out the half that is
// zero, and which half it is depends on what its rows and its sum run over; so there are three parameters.
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
                    const AttentionShape& s, const Visibility& visible) {
  alignas(64) float scores[kBlock * kBlock];
  alignas(64) float dp[kBlock * kBlock];
  const std::int64_t padded = round_to_lanes(s.head_dim);
  std::fill_n(w.dq_P, kBlock * padded, 0.0f);
  const std::int64_t last = last_key_block(query_block, s.seq_len, visible);
  for (std::int64_t key_block = first_key_block(query_block, visible); key_block <= last; ++key_block) {
    const BlockPair pair = block_pair(query_block, key_block, s.seq_len, visible);
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

template <bool kAdd, class T>
void unpack_rows(T* dst, std::int64_t ldd, const float* src, std::int64_t lds, std::int64_t rows,
                 std::int64_t width, float scale) {
  for (std::int64_t r = 0; r < rows; ++r)
    for_lanes(width, [&](std::int64_t d, auto lanes) {
      f32x16 x = load(src + r * lds + d) * scale;
      if constexpr (kAdd) x += load(dst + r * ldd + d, lanes);
      store(dst + r * ldd + d, x, lanes);
    });
}

// Tensors of one sequence.
template <class T, class Out>
struct Sequence {
  Heads<Out> dq, dk, dv;
  Heads<const T> q, k, v;
  const T *dout, *out;
  const float* lse;
  Visibility visible;
};

template <bool kAdd, class T, class Out>
void backward_query_block(const Workspace& w, const Sequence<T, Out>& seq, std::int64_t head,
                          std::int64_t block, const AttentionShape& s) {
  const std::int64_t first = block * kBlock, rows = std::min(kBlock, s.seq_len - first);
  const std::int64_t padded = round_to_lanes(s.head_dim), out_width = s.heads * s.head_dim;
  const std::int64_t at = head * s.head_dim, out_at = first * out_width + at;
  const float scale = 1.0f / std::sqrt(static_cast<float>(s.head_dim));
  pack_rows(w.q_P, padded, seq.q.base + first * seq.q.width + at, seq.q.width, rows, s.head_dim, scale);
  pack_rows(w.dout_P, padded, seq.dout + out_at, out_width, rows, s.head_dim, 1.0f);
  float lse[kBlock], delta[kBlock];
  for (std::int64_t r = 0; r < rows; ++r) {
    lse[r] = seq.lse[(first + r) * s.heads + head];
    const T* out = seq.out + out_at + r * out_width;
    // sum_k p_k dp_k = sum_k p_k (dout . v_k) = dout . out: no pass over the keys.
    delta[r] = sum_lanes(s.head_dim, [&](std::int64_t d, auto lanes) {
      return load(w.dout_P + r * padded + d) * load(out + d, lanes);
    });
  }
  backward_block(w, block, lse, delta, s, seq.visible);
  unpack_rows<kAdd>(seq.dq.base + first * seq.dq.width + at, seq.dq.width, w.dq_P, padded, rows, s.head_dim,
                    scale);
}

template <bool kAdd, class T, class Out>
void backward_kv_head(const Workspace& w, const Sequence<T, Out>& seq, std::int64_t kv_head,
                      const AttentionShape& s) {
  const std::int64_t blocks = blocks_of(s.seq_len), padded = round_to_lanes(s.head_dim);
  const std::int64_t at = kv_head * s.head_dim;
  for (std::int64_t block = 0; block < blocks; ++block) {
    const std::int64_t first = block * kBlock, rows = std::min(kBlock, s.seq_len - first);
    const T *key = seq.k.base + first * seq.k.width + at, *value = seq.v.base + first * seq.v.width + at;
    pack_columns(w.keys_DS + first * s.head_dim, key, seq.k.width, rows, s.head_dim);
    pack_columns(w.values_DS + first * s.head_dim, value, seq.v.width, rows, s.head_dim);
    pack_rows(w.keys_SP + first * padded, padded, key, seq.k.width, rows, s.head_dim, 1.0f);
  }
  // The sums of all query heads of the group, rounded once when the last of them is done.
  std::fill_n(w.dkeys_SP, blocks * kBlock * padded, 0.0f);
  std::fill_n(w.dvalues_SP, blocks * kBlock * padded, 0.0f);
  const std::int64_t group = s.heads / s.kv_heads;
  for (std::int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
    for (std::int64_t block = 0; block < blocks; ++block) backward_query_block<kAdd>(w, seq, head, block, s);
  unpack_rows<kAdd>(seq.dk.base + at, seq.dk.width, w.dkeys_SP, padded, s.seq_len, s.head_dim, 1.0f);
  unpack_rows<kAdd>(seq.dv.base + at, seq.dv.width, w.dvalues_SP, padded, s.seq_len, s.head_dim, 1.0f);
}

// `all`: the tensors from their first row on; a sequence's stand seq_len rows further each time.
template <bool kAdd, class T, class Out>
void backward(Exec& ex, std::int64_t sequences, const Sequence<T, Out>& all, const AttentionShape& s) {
  const std::int64_t blocks = blocks_of(s.seq_len), padded = round_to_lanes(s.head_dim);
  const std::int64_t floats = Workspace::floats(blocks, padded), out_width = s.heads * s.head_dim;
  ScratchScope scope(*ex.scratch);
  float* work = ex.scratch->take({worker_count(), floats}, DType::kF32, "attention_backward").as<float>();
  parallel_tasks(sequences * s.kv_heads, [&](std::int64_t i, std::int64_t worker) {
    const std::int64_t t = i / s.kv_heads * s.seq_len;  // the sequence's first token
    const auto from = [&](auto heads) {
      heads.base += t * heads.width;
      return heads;
    };
    const Sequence<T, Out> seq{from(all.dq),
                               from(all.dk),
                               from(all.dv),
                               from(all.q),
                               from(all.k),
                               from(all.v),
                               all.dout + t * out_width,
                               all.out + t * out_width,
                               all.lse + t * s.heads,
                               from_token(all.visible, t)};
    backward_kv_head<kAdd>(Workspace(work + worker * floats, blocks, padded), seq, i % s.kv_heads, s);
  });
}

}  // namespace

void attention_backward(Exec& ex, TensorView dqkv_TH, ConstTensorView dout_TQ, ConstTensorView qkv_TH,
                        const Attended& saved, AttentionShape shape, ConstTensorView document_T) {
  const auto& [out_TQ, lse_TN] = saved;
  const std::int64_t width = shape.qkv_width(), key_at = shape.heads * shape.head_dim,
                     value_at = key_at + shape.kv_heads * shape.head_dim;
  with_float_type(qkv_TH.dtype, [&](auto type) {
    using T = decltype(type);
    T* dq = dqkv_TH.as<T>();
    const T* q = qkv_TH.as<T>();
    backward<false, T, T>(ex, qkv_TH.shape[0] / shape.seq_len,
                          {{dq, width},
                           {dq + key_at, width},
                           {dq + value_at, width},
                           {q, width},
                           {q + key_at, width},
                           {q + value_at, width},
                           dout_TQ.as<T>(),
                           out_TQ.as<T>(),
                           lse_TN.as<float>(),
                           visibility_in(shape, document_T)},
                          shape);
  });
}

void attention_pair_backward(Exec& ex, const ChunkPairGradients& g, ConstTensorView dout_TQ,
                             ConstTensorView qkv_TH, ConstTensorView kv_TK, const Attended& whole,
                             const ChunkPair& pair) {
  const AttentionShape& shape = pair.shape;
  const std::int64_t value_at = shape.kv_heads * shape.head_dim, width = 2 * value_at;
  with_float_type(qkv_TH.dtype, [&](auto type) {
    using T = decltype(type);
    auto *dq = g.dq_TQ.as<float>(), *dk = g.dkv_TK.as<float>();
    const T* k = kv_TK.as<T>();
    backward<true, T, float>(ex, qkv_TH.shape[0] / shape.seq_len,
                             {{dq, shape.heads * shape.head_dim},
                              {dk, width},
                              {dk + value_at, width},
                              {qkv_TH.as<T>(), shape.qkv_width()},
                              {k, width},
                              {k + value_at, width},
                              dout_TQ.as<T>(),
                              whole.out_TQ.as<T>(),
                              whole.lse_TN.as<float>(),
                              visibility_in(pair)},
                             shape);
  });
}

}  // namespace upmoe::cpu
