// Forward of causal attention: for each block of queries a running maximum and a running sum over the blocks of keys
// ("online softmax"), so that no more than one 64 x 64 tile of scores exists per thread.

#include "kernels/ops/attention.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/cpu/attention_blocks.h"
#include "kernels/cpu/attention_run.h"
#include "kernels/cpu/parallel_for.h"
#include "kernels/cpu/vector_math.h"
#include "kernels/ops/backend.h"

namespace upmoe::cpu {

namespace {

// What a row keeps, for the keys seen so far, with s their scores:
//
//   max = max s      sum = sum of exp(s - max)      out = sum of exp(s - max) v
//
// A new maximum multiplies what is there by exp(old max - new max); in the end out / sum is the attention and max +
// log(sum) the log-sum-exp that the backward starts from.
//
// The state of one block of queries while it walks over the keys.
struct Softmax {
  float* out;  // [kBlock, padded head_dim], not yet divided by `sum`
  std::int64_t padded;
  alignas(64) float max[kBlock];
  alignas(64) float sum[kBlock];
};

// Turns the scores of one block of keys, times `scale`, into probabilities relative to the new maximum, and rescales
// what was summed before. `probabilities` of fp32 may be the scores. A row that has seen no visible key yet keeps max =
// -inf and sum = 0.
template <class Unit>
void online_softmax(Softmax& state, const float* scores, Unit* probabilities, std::int64_t queries,
                    float scale) {
  alignas(64) float reference[kBlock] = {}, rescale[kBlock];
  const float minus_infinity = -std::numeric_limits<float>::infinity();
  for (std::int64_t r = 0; r < queries; ++r) {
    f32x16 m = load(scores + r * kBlock);
    for (std::int64_t v = 1; v < kBlockVectors; ++v) m = max(m, load(scores + r * kBlock + v * kLanes));
    const float new_max = std::max(state.max[r], reduce_max(m) * scale);
    reference[r] = new_max == minus_infinity ? 0.0f : new_max;  // -inf - -inf would be NaN
  }
  for (std::int64_t v = 0; v < kBlock; v += kLanes)
    store(rescale + v, vector_exp(load(state.max + v) - load(reference + v)));
  for (std::int64_t r = 0; r < queries; ++r) {
    f32x16 sum{};
    for (std::int64_t v = 0; v < kBlockVectors; ++v) {
      const f32x16 p = vector_exp(load(scores + r * kBlock + v * kLanes) * scale - reference[r]);
      store_units(probabilities + r * kBlock / kPerUnit<Unit>, v * kLanes, p);
      sum += p;
    }
    state.sum[r] = state.sum[r] * rescale[r] + reduce_add(sum);
    if (state.sum[r] > 0) state.max[r] = reference[r];
    // Most blocks bring no new maximum: their row of `out` is left alone.
    if (rescale[r] != 1.0f)
      for (std::int64_t d = 0; d < state.padded; d += kLanes)
        store(state.out + r * state.padded + d, load(state.out + r * state.padded + d) * rescale[r]);
  }
}

// One thread's memory: the keys and values of a sequence and head from one of their blocks on, and one block of
// queries. P: the head_dim up to whole vectors.
template <class Unit>
struct Workspace {
  std::int64_t first;  // block of keys
  Unit* keys_DS;       // [blocks, units of head_dim, kBlock]
  Unit* values_SP;     // [blocks, units of kBlock, P]
  Unit* q_P;           // [kBlock, units of P]
  float* out_P;        // [kBlock, P]

  // Units and floats have one size.
  static std::int64_t units(std::int64_t blocks, std::int64_t padded) {
    return (2 * blocks + 1) * kBlock * padded / kPerUnit<Unit> + kBlock * padded;
  }
  Workspace(float* memory, std::int64_t first_block, std::int64_t blocks, std::int64_t padded) {
    const std::int64_t block = kBlock * padded / kPerUnit<Unit>;
    first = first_block;
    out_P = memory;
    keys_DS = reinterpret_cast<Unit*>(out_P + kBlock * padded);
    values_SP = keys_DS + blocks * block;
    q_P = values_SP + blocks * block;
  }
};

// All keys that query block `query_block` can see; w.q_P is packed.
template <class Form, class Unit>
void attend(Softmax& state, const Workspace<Unit>& w, std::int64_t query_block, const AttentionShape& shape,
            const Visibility& visible) {
  constexpr std::int64_t kPer = kPerUnit<Unit>;
  alignas(64) float scores[kBlock * kBlock];
  alignas(64) std::uint32_t pairs[kPer == 1 ? 1 : kBlock * kBlock / kPer];
  Unit* probabilities = nullptr;
  if constexpr (kPer == 1) {
    probabilities = scores;
  } else {
    probabilities = pairs;
  }
  std::fill_n(state.out, kBlock * state.padded, 0.0f);
  std::fill_n(state.max, kBlock, -std::numeric_limits<float>::infinity());
  std::fill_n(state.sum, kBlock, 0.0f);
  const std::int64_t last = last_key_block(query_block, shape.seq_len, visible);
  const std::int64_t block = kBlock * state.padded / kPer;
  for (std::int64_t key_block = first_key_block(query_block, visible); key_block <= last; ++key_block) {
    const BlockPair pair = block_pair(query_block, key_block, shape.seq_len, visible);
    const Documents documents = compare_documents(pair);
    if (documents == Documents::kDisjoint) continue;
    block_scores<Form>(scores, pair, documents, w.q_P, state.padded / kPer,
                       w.keys_DS + (key_block - w.first) * block, units_of<Unit>(shape.head_dim));
    online_softmax(state, scores, probabilities, pair.queries, Scales<Unit>(shape.head_dim).score);
    const BlockProduct<Unit> product{state.out,
                                     state.padded,
                                     probabilities,
                                     kBlock / kPer,
                                     w.values_SP + (key_block - w.first) * block,
                                     state.padded,
                                     pair.queries,
                                     state.padded,
                                     units_of<Unit>(pair.keys)};
    if (pair.diagonal) {
      // Behind the diagonal the probabilities are exp(-inf) = 0: products with them are left out, not masked.
      Form::template multiply<false, true, Causal::kKeyDepth>(product);
    } else {
      Form::template multiply<false, true, Causal::kFull>(product);
    }
  }
}

// Tensors of one sequence.
template <class T, class Out>
struct Sequence {
  Out* out;
  float* lse;
  Heads<const T> q, k, v;
  Visibility visible;
  std::int64_t first_query = 0;  // the tokens before it have keys alone: q, out and lse begin with this one
  std::int64_t slots = 0;        // token i has its key in row i mod slots; 0: in row i
};

// The keys and values of one block, into its place. Rows that a ring of slots turns within are put behind one another
// first, where no output is yet.
template <class Form, class T, class Out>
void pack_block(const Workspace<typename Form::Unit>& w, const Sequence<T, Out>& seq, std::int64_t at,
                std::int64_t block, const AttentionShape& s) {
  const std::int64_t padded = round_to_lanes(s.head_dim);
  const std::int64_t place = (block - w.first) * kBlock * padded / kPerUnit<UnitOf<T>>;
  const std::int64_t first = block * kBlock, rows = std::min(kBlock, s.seq_len - first);
  const std::int64_t row = seq.slots > 0 ? first % seq.slots : first;
  const auto in_order = [&](const Heads<const T>& heads) {
    if (seq.slots == 0 || row + rows <= seq.slots)
      return Heads<const T>{heads.base + row * heads.width + at, heads.width};
    T* gathered = reinterpret_cast<T*>(w.out_P);
    for (std::int64_t r = 0; r < rows; ++r)
      std::memcpy(static_cast<void*>(gathered + r * s.head_dim),
                  heads.base + (first + r) % seq.slots * heads.width + at,
                  static_cast<std::size_t>(s.head_dim) * sizeof(T));
    return Heads<const T>{gathered, s.head_dim};
  };
  const Heads<const T> k = in_order(seq.k);
  pack_transposed(w.keys_DS + place, rows_of(kBlock), kBlock, k.base, k.width, rows, s.head_dim);
  const Heads<const T> v = in_order(seq.v);
  pack_block_by_depth<Form>(w.values_SP + place, padded, v.base, v.width, rows, s.head_dim);
}

// Blocks w.first to `last`.
template <class Form, class T, class Out>
void pack_keys(const Workspace<typename Form::Unit>& w, const Sequence<T, Out>& seq, std::int64_t kv_head,
               std::int64_t last, const AttentionShape& s) {
  for (std::int64_t block = w.first; block <= last; ++block)
    pack_block<Form>(w, seq, kv_head * s.head_dim, block, s);
}

// A query that sees no key, which only a pair of different chunks can have, gets 0 and -inf.
template <class Form, class T, class Out>
void forward_query_block(const Workspace<typename Form::Unit>& w, const Sequence<T, Out>& seq,
                         std::int64_t head, std::int64_t block, const AttentionShape& s) {
  const std::int64_t first = block * kBlock, rows = std::min(kBlock, s.seq_len - first);
  // Of those before the first query nothing is read or written; what stands in their place is never looked at.
  const std::int64_t absent = std::max<std::int64_t>(0, seq.first_query - first);
  const std::int64_t query = first + absent - seq.first_query;
  const std::int64_t padded = round_to_lanes(s.head_dim), width = seq.q.width;
  using Unit = UnitOf<T>;
  const std::int64_t ldq = padded / kPerUnit<Unit>;
  std::fill_n(w.q_P, absent * ldq, Unit{});
  pack_queries(w.q_P + absent * ldq, ldq, seq.q.base + query * width + head * s.head_dim, width,
               rows - absent, s.head_dim, Scales<Unit>(s.head_dim).query);
  Softmax state;
  state.out = w.out_P;
  state.padded = padded;
  attend<Form>(state, w, block, s, seq.visible);
  for (std::int64_t r = absent; r < rows; ++r) {
    const std::int64_t at = (first + r - seq.first_query) * s.heads + head;
    seq.lse[at] = state.max[r] + std::log(state.sum[r]);
    const float inverse = state.sum[r] > 0 ? 1.0f / state.sum[r] : 0.0f;
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

// `all`: the tensors from their first row on; a sequence's stand seq_len rows further each time.
template <class Form, class T, class Out>
void forward_in(Exec& ex, std::int64_t sequences, const Sequence<T, Out>& all, const AttentionShape& s) {
  // Blocks of all tokens; the first that has a query, and the first of whose keys it sees some.
  const std::int64_t blocks = blocks_of(s.seq_len), begin = all.first_query / kBlock,
                     first_key = std::min(blocks, first_key_block(begin, all.visible));
  const std::int64_t padded = round_to_lanes(s.head_dim),
                     units = Workspace<typename Form::Unit>::units(blocks - first_key, padded);
  const std::int64_t group = s.heads / s.kv_heads, parts = parts_of(sequences * s.kv_heads, blocks - begin);
  ScratchScope scope(*ex.scratch);
  float* work = ex.scratch->take({worker_count(), units}, DType::kF32, "attention_forward").as<float>();
  // One key/value head serves a group of query heads, so a task packs its keys once for all of them. Parts take every
  // parts-th block of queries: late blocks see more keys than early ones, and each part gets of both.
  //
  //   blocks of queries, parts = 3    0 1 2 0 1 2 0 ...
  parallel_tasks(sequences * s.kv_heads * parts, [&](std::int64_t i, std::int64_t worker) {
    const std::int64_t part = i % parts, kv_head = i / parts % s.kv_heads;
    const std::int64_t t = i / parts / s.kv_heads * s.seq_len;  // the sequence's first token
    const auto from = [&](const Heads<const T>& h) { return Heads<const T>{h.base + t * h.width, h.width}; };
    const Sequence<T, Out> seq{
        all.out + t * s.heads * s.head_dim, all.lse + t * s.heads, from(all.q), from(all.k), from(all.v),
        from_token(all.visible, t),         all.first_query,       all.slots};
    [[maybe_unused]] const typename Form::Use use{};
    const Workspace<typename Form::Unit> w(work + worker * units, first_key, blocks - first_key, padded);
    const std::int64_t first = begin + part,
                       last = (blocks - 1 - first) / parts * parts + first;  // this part's blocks
    // No further than the last block of this part can see.
    pack_keys<Form>(w, seq, kv_head, last_key_block(last, s.seq_len, seq.visible), s);
    for (std::int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
      for (std::int64_t block = first; block < blocks; block += parts)
        forward_query_block<Form>(w, seq, head, block, s);
  });
}

template <class T, class Out>
void forward(Exec& ex, std::int64_t sequences, const Sequence<T, Out>& all, const AttentionShape& s) {
  with_block_form<T>(s.head_dim, [&]<class Form>(Form) { forward_in<Form>(ex, sequences, all, s); });
}

}  // namespace

void attention_forward(Exec& ex, TensorView out_TQ, TensorView lse_TN, ConstTensorView qkv_TH,
                       AttentionShape shape, ConstTensorView document_T) {
  with_float_type(qkv_TH.dtype, [&](auto type) {
    using T = decltype(type);
    const std::int64_t width = shape.qkv_width(), keys = shape.heads * shape.head_dim;
    const T* q = qkv_TH.as<T>();
    forward<T, T>(ex, qkv_TH.shape[0] / shape.seq_len,
                  {out_TQ.as<T>(),
                   lse_TN.as<float>(),
                   {q, width},
                   {q + keys, width},
                   {q + keys + shape.kv_heads * shape.head_dim, width},
                   visibility_in(shape, document_T)},
                  shape);
  });
}

void attention_pair_forward(Exec& ex, TensorView out_TQ, TensorView lse_TN, ConstTensorView qkv_TH,
                            ConstTensorView kv_TK, const ChunkPair& pair) {
  const AttentionShape& shape = pair.shape;
  with_float_type(qkv_TH.dtype, [&](auto type) {
    using T = decltype(type);
    const std::int64_t width = 2 * shape.kv_heads * shape.head_dim;
    const T* k = kv_TK.as<T>();
    forward<T, float>(ex, qkv_TH.shape[0] / shape.seq_len,
                      {out_TQ.as<float>(),
                       lse_TN.as<float>(),
                       {qkv_TH.as<T>(), shape.qkv_width()},
                       {k, width},
                       {k + shape.kv_heads * shape.head_dim, width},
                       visibility_in(pair)},
                      shape);
  });
}

// The keys of a row's tokens are there from its first one on, as those of a sequence; queries from the run's first on.
void attend_run(Exec& ex, TensorView out_TQ, ConstTensorView qkv_TH, const KeyCache& cache,
                const CachedTokens& tokens, const AttentionShape& shape) {
  const std::int64_t slots = cache.k_BSK.shape[1], width = shape.kv_heads * shape.head_dim,
                     row = *tokens.row_T.as<std::int32_t>() * slots * width,
                     begin = *tokens.position_T.as<std::int32_t>();
  AttentionShape s = shape;
  s.seq_len = begin + tokens.run;
  ScratchScope scope(*ex.scratch);
  float* lse = ex.scratch->take({tokens.run, s.heads}, DType::kF32, "log-sum-exp of a run").as<float>();
  with_float_type(qkv_TH.dtype, [&](auto type) {
    using T = decltype(type);
    forward<T, T>(ex, 1,
                  {out_TQ.as<T>(),
                   lse,
                   {qkv_TH.as<T>(), s.qkv_width()},
                   {cache.k_BSK.as<T>() + row, width},
                   {cache.v_BSK.as<T>() + row, width},
                   visibility_in(s, {}),
                   begin,
                   slots},
                  s);
  });
}

void attention_merge(Exec&, TensorView out_TQ, TensorView lse_TN, ConstTensorView part_TQ,
                     ConstTensorView part_lse_TN) {
  const std::int64_t heads = lse_TN.shape[1], width = heads == 0 ? 0 : out_TQ.shape[1] / heads;
  parallel_for(lse_TN.elements(), 4 * width, [&](std::int64_t i) {
    float& lse = lse_TN.as<float>()[i];
    const float part = part_lse_TN.as<float>()[i], largest = std::max(lse, part);
    if (largest == -std::numeric_limits<float>::infinity()) return;  // neither has seen a key
    const float mine = std::exp(lse - largest), theirs = std::exp(part - largest), sum = mine + theirs;
    float* out = out_TQ.as<float>() + i * width;
    const float* from = part_TQ.as<float>() + i * width;
    for_lanes(width, [&](std::int64_t d, auto lanes) {
      store(out + d, load(out + d, lanes) * (mine / sum) + load(from + d, lanes) * (theirs / sum), lanes);
    });
    lse = largest + std::log(sum);
  });
}

}  // namespace upmoe::cpu
