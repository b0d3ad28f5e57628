// Backward of causal attention. The probabilities are computed again from the saved log-sum-exp; with
// delta = rowsum(dout * out) and p = exp(s - lse):
//   dv = p^T dout,  dp = dout v^T,  ds = p (dp - delta),  dq = scale ds k,  dk = ds^T (scale q).
// One task owns a sequence and a key/value head, and walks over its query heads and query blocks in order:
// the sums of dk and dv have one order and one writer, whatever the number of threads.

#include <cmath>
#include <cstring>

#include "kernels/cpu/attention_blocks.h"
#include "kernels/cpu/parallel_for.h"
#include "kernels/cpu/vector_math.h"
#include "kernels/ops/backend.h"

namespace upmoe::cpu {

namespace {

// One thread's memory. Blocks are kBlock rows; S is the sequence rounded up to blocks, P the padded head_dim. Keys
// stand here twice, because the two products with them sum over different indices: q k^T over head_dim, which takes
// keys_DS, and ds k over keys, which takes keys_SP. Values are in a product of the first kind only. Of queries and dout
// the rows are first factors of sums over head_dim, and second ones of sums over queries: in fp32 those are the same
// rows.
template <class Unit>
struct Workspace {
  static constexpr std::int64_t kPer = kPerUnit<Unit>;
  float *dkeys_SP, *dvalues_SP;
  float* dq_P;                       // [kBlock, P]
  Unit *keys_DS, *values_DS;         // [blocks, units of head_dim, kBlock]
  Unit* keys_SP;                     // [blocks, units of kBlock, P]
  Unit *q_P, *dout_P;                // [kBlock, units of P]
  Unit *q_by_depth, *dout_by_depth;  // [units of kBlock, P]

  // Units and floats have one size.
  static std::int64_t units(std::int64_t blocks, std::int64_t padded) {
    return ((2 * blocks + 1) * kPer + 3 * blocks + 2 * kPer) * kBlock * padded / kPer;
  }

  Workspace(float* memory, std::int64_t blocks, std::int64_t padded) {
    const std::int64_t one = kBlock * padded, all = blocks * one;
    dkeys_SP = memory;
    dvalues_SP = dkeys_SP + all;
    dq_P = dvalues_SP + all;
    keys_DS = reinterpret_cast<Unit*>(dq_P + one);
    values_DS = keys_DS + all / kPer;
    keys_SP = values_DS + all / kPer;
    q_P = keys_SP + all / kPer;
    dout_P = q_P + one / kPer;
    q_by_depth = kPer == 1 ? q_P : dout_P + one / kPer;
    dout_by_depth = kPer == 1 ? dout_P : q_by_depth + one / kPer;
  }
};

// Scores and dp of one pair of blocks; then probabilities and ds, as first factors of products: two of sums over
// queries, read by columns, one of a sum over keys.
template <class Unit>
struct Tiles {
  alignas(64) float scores[kBlock * kBlock];
  alignas(64) float dp[kBlock * kBlock];
  const float* p_by_query() const { return scores; }
  const float* ds_by_query() const { return dp; }
  const float* ds_by_key() const { return dp; }
};

//   pairs of queries   p_00 p_10 | p_01 p_11 | ...      pairs of keys   ds_00 ds_01 | ds_02 ds_03 | ...
//                      p_20 p_30 | p_21 p_31 | ...                      ds_10 ds_11 | ds_12 ds_13 | ...
template <>
struct Tiles<std::uint32_t> {
  static constexpr std::int64_t kUnits = kBlock * kBlock / 2;
  alignas(64) float scores[kBlock * kBlock];
  alignas(64) float dp[kBlock * kBlock];
  alignas(64) std::uint32_t p_pairs[kUnits], ds_pairs[kUnits], ds_rows[kUnits];
  const std::uint32_t* p_by_query() const { return p_pairs; }
  const std::uint32_t* ds_by_query() const { return ds_pairs; }
  const std::uint32_t* ds_by_key() const { return ds_rows; }
};

// From masked scores, which are scaled, and dp.
void probability_gradient(Tiles<float>& tiles, const BlockPair& pair, const float* lse, const float* delta) {
  for (std::int64_t r = 0; r < pair.queries; ++r) {
    float *p_r = tiles.scores + r * kBlock, *ds_r = tiles.dp + r * kBlock;
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

// Sixteen pairs, each of two neighbours of one column.
[[maybe_unused]] void store_columns(std::uint32_t* row, f32x16 even, f32x16 odd) {
  const u32x16 words = bf16_pairs(even, odd);
  std::memcpy(row, &words, sizeof words);
}

// From masked scores, which `scale` is still to come to, and dp. Two rows at a time, an odd last one beside zeros.
[[maybe_unused]] void probability_gradient(Tiles<std::uint32_t>& tiles, const BlockPair& pair,
                                           const float* lse, const float* delta, float scale) {
  struct Of {
    f32x16 p{}, ds{};
  };
  for (std::int64_t r = 0; r < pair.queries; r += 2) {
    for (std::int64_t at = 0; at < kBlock; at += kLanes) {
      Of row[2];
      const bool computed = at < pair.vectors(r) * kLanes;  // of both rows, or of none
      for (std::int64_t i = 0; i < 2 && computed && r + i < pair.queries; ++i) {
        const std::int64_t place = (r + i) * kBlock + at;
        row[i].p = vector_exp(load(tiles.scores + place) * scale - lse[r + i]);
        row[i].ds = row[i].p * (load(tiles.dp + place) - delta[r + i]);
      }
      store_columns(tiles.p_pairs + r / 2 * kBlock + at, row[0].p, row[1].p);
      store_columns(tiles.ds_pairs + r / 2 * kBlock + at, row[0].ds, row[1].ds);
      for (std::int64_t i = 0; i < 2; ++i) store_units(tiles.ds_rows + (r + i) * kBlock / 2, at, row[i].ds);
    }
  }
}

// Five products of 64 x 64 tiles, scores among them (block_scores). On the diagonal each leaves out the half that is
// zero, and which half it is depends on what its rows and its sum run over; so there are three parameters.
template <class Form, Causal kColumns, Causal kKeys, Causal kQueries, class Unit>
void block_gradients(const Workspace<Unit>& w, Tiles<Unit>& tiles, const BlockPair& pair,
                     std::int64_t key_block, const float* lse, const float* delta, std::int64_t head_dim,
                     std::int64_t padded) {
  constexpr std::int64_t kPer = kPerUnit<Unit>;
  const std::int64_t first = key_block * kBlock * padded, queries = units_of<Unit>(pair.queries);
  Form::template multiply<false, false, kColumns>({tiles.dp, kBlock, w.dout_P, padded / kPer,
                                                   w.values_DS + first / kPer, kBlock, pair.queries, kBlock,
                                                   units_of<Unit>(head_dim)});
  if constexpr (kPer == 1) {
    probability_gradient(tiles, pair, lse, delta);
  } else {
    probability_gradient(tiles, pair, lse, delta, Scales<Unit>(head_dim).score);
  }
  Form::template multiply<true, true, kQueries>({w.dvalues_SP + first, padded, tiles.p_by_query(), kBlock,
                                                 w.dout_by_depth, padded, pair.keys, padded, queries});
  Form::template multiply<true, true, kQueries>({w.dkeys_SP + first, padded, tiles.ds_by_query(), kBlock,
                                                 w.q_by_depth, padded, pair.keys, padded, queries});
  Form::template multiply<false, true, kKeys>({w.dq_P, padded, tiles.ds_by_key(), kBlock / kPer,
                                               w.keys_SP + first / kPer, padded, pair.queries, padded,
                                               units_of<Unit>(pair.keys)});
}

// The gradients of one block of queries of one head, whose tensors are packed.
template <class Form, class Unit>
void backward_block(const Workspace<Unit>& w, std::int64_t query_block, const float* lse, const float* delta,
                    const AttentionShape& s, const Visibility& visible) {
  Tiles<Unit> tiles;
  const std::int64_t padded = round_to_lanes(s.head_dim);
  std::fill_n(w.dq_P, kBlock * padded, 0.0f);
  const std::int64_t last = last_key_block(query_block, s.seq_len, visible);
  for (std::int64_t key_block = first_key_block(query_block, visible); key_block <= last; ++key_block) {
    const BlockPair pair = block_pair(query_block, key_block, s.seq_len, visible);
    const Documents documents = compare_documents(pair);
    if (documents == Documents::kDisjoint) continue;
    block_scores<Form>(tiles.scores, pair, documents, w.q_P, padded / kPerUnit<Unit>,
                       w.keys_DS + key_block * kBlock * padded / kPerUnit<Unit>, units_of<Unit>(s.head_dim));
    if (pair.diagonal) {
      block_gradients<Form, Causal::kKeyColumns, Causal::kKeyDepth, Causal::kQueryDepth>(
          w, tiles, pair, key_block, lse, delta, s.head_dim, padded);
    } else {
      block_gradients<Form, Causal::kFull, Causal::kFull, Causal::kFull>(w, tiles, pair, key_block, lse,
                                                                         delta, s.head_dim, padded);
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

template <class Form, bool kAdd, class T, class Out>
void backward_query_block(const Workspace<typename Form::Unit>& w, const Sequence<T, Out>& seq,
                          std::int64_t head, std::int64_t block, const AttentionShape& s) {
  const std::int64_t first = block * kBlock, rows = std::min(kBlock, s.seq_len - first);
  const std::int64_t padded = round_to_lanes(s.head_dim), out_width = s.heads * s.head_dim;
  const std::int64_t at = head * s.head_dim, out_at = first * out_width + at;
  using Unit = UnitOf<T>;
  const Scales<Unit> scales(s.head_dim);
  const T *q = seq.q.base + first * seq.q.width + at, *dout = seq.dout + out_at;
  const std::int64_t ld = padded / kPerUnit<Unit>;
  pack_queries(w.q_P, ld, q, seq.q.width, rows, s.head_dim, scales.query);
  pack_queries(w.dout_P, ld, dout, out_width, rows, s.head_dim, 1.0f);
  if constexpr (kPerUnit<Unit> != 1) {
    pack_block_by_depth<Form>(w.q_by_depth, padded, q, seq.q.width, rows, s.head_dim);
    pack_block_by_depth<Form>(w.dout_by_depth, padded, dout, out_width, rows, s.head_dim);
  }
  float lse[kBlock], delta[kBlock];
  for (std::int64_t r = 0; r < rows; ++r) {
    lse[r] = seq.lse[(first + r) * s.heads + head];
    const T *dout_r = dout + r * out_width, *out = seq.out + out_at + r * out_width;
    // sum_k p_k dp_k = sum_k p_k (dout . v_k) = dout . out: no pass over the keys.
    delta[r] = sum_lanes(s.head_dim, [&](std::int64_t d, auto lanes) {
      return load(dout_r + d, lanes) * load(out + d, lanes);
    });
  }
  backward_block<Form>(w, block, lse, delta, s, seq.visible);
  unpack_rows<kAdd>(seq.dq.base + first * seq.dq.width + at, seq.dq.width, w.dq_P, padded, rows, s.head_dim,
                    scales.query * scales.score);
}

template <class Form, bool kAdd, class T, class Out>
void backward_kv_head(const Workspace<typename Form::Unit>& w, const Sequence<T, Out>& seq,
                      std::int64_t kv_head, const AttentionShape& s) {
  const std::int64_t blocks = blocks_of(s.seq_len), padded = round_to_lanes(s.head_dim);
  const std::int64_t at = kv_head * s.head_dim;
  for (std::int64_t block = 0; block < blocks; ++block) {
    const std::int64_t first = block * kBlock, rows = std::min(kBlock, s.seq_len - first);
    const T *key = seq.k.base + first * seq.k.width + at, *value = seq.v.base + first * seq.v.width + at;
    const std::int64_t place = first * padded / kPerUnit<UnitOf<T>>;
    pack_transposed(w.keys_DS + place, rows_of(kBlock), kBlock, key, seq.k.width, rows, s.head_dim);
    pack_transposed(w.values_DS + place, rows_of(kBlock), kBlock, value, seq.v.width, rows, s.head_dim);
    pack_block_by_depth<Form>(w.keys_SP + place, padded, key, seq.k.width, rows, s.head_dim);
  }
  // The sums of all query heads of the group, rounded once when the last of them is done.
  std::fill_n(w.dkeys_SP, blocks * kBlock * padded, 0.0f);
  std::fill_n(w.dvalues_SP, blocks * kBlock * padded, 0.0f);
  const std::int64_t group = s.heads / s.kv_heads;
  for (std::int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
    for (std::int64_t block = 0; block < blocks; ++block)
      backward_query_block<Form, kAdd>(w, seq, head, block, s);
  unpack_rows<kAdd>(seq.dk.base + at, seq.dk.width, w.dkeys_SP, padded, s.seq_len, s.head_dim,
                    Scales<UnitOf<T>>(s.head_dim).score);
  unpack_rows<kAdd>(seq.dv.base + at, seq.dv.width, w.dvalues_SP, padded, s.seq_len, s.head_dim, 1.0f);
}

// `all`: the tensors from their first row on; a sequence's stand seq_len rows further each time.
template <class Form, bool kAdd, class T, class Out>
void backward_in(Exec& ex, std::int64_t sequences, const Sequence<T, Out>& all, const AttentionShape& s) {
  const std::int64_t blocks = blocks_of(s.seq_len), padded = round_to_lanes(s.head_dim);
  const std::int64_t units = Workspace<typename Form::Unit>::units(blocks, padded),
                     out_width = s.heads * s.head_dim;
  ScratchScope scope(*ex.scratch);
  float* work = ex.scratch->take({worker_count(), units}, DType::kF32, "attention_backward").as<float>();
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
    [[maybe_unused]] const typename Form::Use use{};
    backward_kv_head<Form, kAdd>(Workspace<typename Form::Unit>(work + worker * units, blocks, padded), seq,
                                 i % s.kv_heads, s);
  });
}

template <bool kAdd, class T, class Out>
void backward(Exec& ex, std::int64_t sequences, const Sequence<T, Out>& all, const AttentionShape& s) {
  with_block_form<T>(s.head_dim, [&]<class Form>(Form) { backward_in<Form, kAdd>(ex, sequences, all, s); });
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
