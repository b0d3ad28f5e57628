#pragma once
// What the forward and the backward of attention share: blocks of queries and keys, packed in units, and their masks.
// Scores and sums are fp32. Where units are pairs of bf16, probabilities and the gradients of scores are rounded to
// bf16 for the products that they are factors of, as cuDNN does it.

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/cpu/block_matmul.h"
#include "kernels/cpu/block_matrices.h"
#include "kernels/cpu/simd.h"
#include "kernels/ops/attention.h"

namespace upmoe::cpu {

constexpr std::int64_t kBlock = 64;  // queries, and keys, of one block: a 64 x 64 tile of scores is 16 KiB
constexpr std::int64_t kBlockVectors = kBlock / kLanes;

inline std::int64_t blocks_of(std::int64_t seq_len) {
  return (seq_len + kBlock - 1) / kBlock;
}

// How products of blocks of elements of T are computed, which attention takes as Form: by vectors, or bf16 in matrix
// registers. Those read whole blocks of keys, and of queries as a sum's terms: what is packed ends with zeros then.
template <class T>
struct BlocksInVectors {
  using Element = T;
  using Unit = UnitOf<T>;
  struct Use {};  // nothing to be had or given back
  static constexpr bool kWhole = false;
  template <bool kTransposeA, bool kAdd, Causal kCausal>
  static void multiply(const BlockProduct<Unit>& p) {
    block_product<kTransposeA, kAdd, kCausal>(p);
  }
};
template <class Registers>
struct BlocksInMatrices {
  using Element = bf16;
  using Unit = std::uint32_t;
  using Use = typename Registers::Use;
  static constexpr bool kWhole = true;
  template <bool kTransposeA, bool kAdd, Causal kCausal>
  static void multiply(const BlockProduct<Unit>& p) {
    block_product_in_matrices<Registers, kTransposeA, kAdd, kCausal>(p);
  }
};

// body(Form{}) for this processor. Matrix registers take heads of whole registers of depth alone.
template <class T, class Body>
inline void with_block_form([[maybe_unused]] std::int64_t head_dim, Body&& body) {
#ifdef UPMOE_MATRIX_REGISTERS
  if constexpr (std::is_same_v<T, bf16>) {
    if (has_matrix_registers() && head_dim % (2 * kMatrixRows) == 0)
      return body(BlocksInMatrices<MatrixRegisters>{});
  }
#endif
  body(BlocksInVectors<T>{});
}

// One block of rows as the second factor of sums over them: [units of kBlock, width].
template <class Form, class T>
inline void pack_block_by_depth(typename Form::Unit* dst, std::int64_t padded, const T* src, std::int64_t lds,
                                std::int64_t rows, std::int64_t width) {
  using Unit = typename Form::Unit;
  pack_depth_major(dst, rows_of(padded), padded, src, lds, width, rows);
  if constexpr (Form::kWhole)
    std::fill(dst + units_of<Unit>(rows) * padded, dst + units_of<Unit>(kBlock) * padded, Unit{});
}

// dst[r, d] = src[r, d] * scale, in fp32; columns from `width` up to whole vectors are zero.
template <class T>
inline void pack_scaled(float* dst, std::int64_t ldd, const T* src, std::int64_t lds, std::int64_t rows,
                        std::int64_t width, float scale) {
  for (std::int64_t r = 0; r < rows; ++r)
    for_lanes(width, [&](std::int64_t d, auto lanes) {
      store(dst + r * ldd + d, load(src + r * lds + d, lanes) * scale);
    });
}

// Where 1 / sqrt(head_dim) comes in. Queries of fp32 are packed with it. Those of bf16 are not, which would round them
// once more: their scores get it, and the gradient of the keys in the end.
template <class Unit>
struct Scales {
  float query, score;
  explicit Scales(std::int64_t head_dim) {
    const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
    query = kPerUnit<Unit> == 1 ? scale : 1.0f;
    score = kPerUnit<Unit> == 1 ? 1.0f : scale;
  }
};

// Rows of queries as the first factor of scores.
template <class T>
inline void pack_queries(UnitOf<T>* dst, std::int64_t ldd, const T* src, std::int64_t lds, std::int64_t rows,
                         std::int64_t width, float scale) {
  if constexpr (kPerUnit<UnitOf<T>> == 1) {
    pack_scaled(dst, ldd, src, lds, rows, width, scale);
  } else {
    pack_rows(dst, ldd, src, lds, rows, width);
  }
}

// Sixteen numbers of a row, from column c on.
inline void store_units(float* row, std::int64_t c, f32x16 x) {
  store(row + c, x);
}
inline void store_units(std::uint32_t* row, std::int64_t c, f32x16 x) {
  const u16x16 bits = to_bf16_bits(x);
  std::memcpy(row + c / 2, &bits, sizeof bits);
}

// The heads of one sequence within wider rows: element d of head h in row i is base[i * width + h * head_dim + d].
template <class T>
struct Heads {
  T* base = nullptr;
  std::int64_t width = 0;
};

// Which keys stand before which queries, and their documents; null without documents.
struct Visibility {
  bool causal = true;  // queries and keys are the same tokens; else all keys come before all queries
  const std::int32_t *query_document_S = nullptr, *key_document_S = nullptr;
  std::int64_t window = 0,
               ahead = 0;  // query i sees keys k > i + ahead - window; without a window, all of them
};

// One block of queries against one block of keys.
struct BlockPair {
  std::int64_t queries, keys;          // how many
  bool diagonal;                       // the same tokens: query r sees keys up to r
  const std::int32_t* query_document;  // null without documents
  const std::int32_t* key_document;
  // Query r sees keys from r + begin on; at most 1 - queries where the window cuts nothing off.
  std::int64_t begin;

  bool cut() const { return queries - 1 + begin > 0; }
  // Vectors of keys that row r of the scores can see; those behind hold garbage after the product on a diagonal.
  std::int64_t vectors(std::int64_t r) const { return diagonal ? r / kLanes + 1 : kBlockVectors; }
};

inline BlockPair block_pair(std::int64_t query_block, std::int64_t key_block, std::int64_t seq_len,
                            const Visibility& visible) {
  const std::int64_t q = query_block * kBlock, k = key_block * kBlock;
  const bool documents = visible.query_document_S != nullptr;
  return {std::min(kBlock, seq_len - q),
          std::min(kBlock, seq_len - k),
          visible.causal && query_block == key_block,
          documents ? visible.query_document_S + q : nullptr,
          documents ? visible.key_document_S + k : nullptr,
          visible.window > 0 ? q + visible.ahead - visible.window + 1 - k : -kBlock};
}

// The first block of keys that a block of queries can see; behind the last one where the window has passed them all.
inline std::int64_t first_key_block(std::int64_t query_block, const Visibility& visible) {
  if (visible.window == 0) return 0;
  return std::max<std::int64_t>(0, query_block * kBlock + visible.ahead - visible.window + 1) / kBlock;
}

// The last block of keys that a block of queries can see.
inline std::int64_t last_key_block(std::int64_t query_block, std::int64_t seq_len,
                                   const Visibility& visible) {
  return visible.causal ? query_block : blocks_of(seq_len) - 1;
}

// That of the sequence which begins at this token; `all` has the documents from the first token on.
inline Visibility from_token(Visibility all, std::int64_t first_token) {
  if (all.query_document_S == nullptr) return all;
  all.query_document_S += first_token;
  all.key_document_S += first_token;
  return all;
}

inline Visibility visibility_in(const AttentionShape& shape, const ConstTensorView& document_T) {
  const auto* document = document_T.if_given<std::int32_t>();
  return {true, document, document, shape.window, 0};
}
inline Visibility visibility_in(const ChunkPair& pair) {
  const bool causal = pair.visible == Visible::kCausal;
  return {causal, pair.document_T.if_given<std::int32_t>(), pair.key_document_T.if_given<std::int32_t>(),
          pair.shape.window, causal ? 0 : pair.ahead};
}

enum class Documents { kDisjoint, kSame, kMixed };

// Whether all, none or some pairs of the two blocks share a document, judged by the ranges of their ids.
inline Documents compare_documents(const BlockPair& pair) {
  if (pair.query_document == nullptr) return Documents::kSame;
  const auto [q_low, q_high] = std::minmax_element(pair.query_document, pair.query_document + pair.queries);
  const auto [k_low, k_high] = std::minmax_element(pair.key_document, pair.key_document + pair.keys);
  if (*q_high < *k_low || *k_high < *q_low) return Documents::kDisjoint;
  return *q_low == *q_high && *k_low == *k_high ? Documents::kSame : Documents::kMixed;
}

// Sets the scores of invisible keys to -inf: keys after the query, before its window, of other documents, and
// columns behind the last key.
inline void mask_scores(float* scores, const BlockPair& pair, Documents documents) {
  if (!pair.diagonal && pair.keys == kBlock && !pair.cut() && documents == Documents::kSame) return;
  const f32x16 minus_infinity = splat(-std::numeric_limits<float>::infinity());
  std::int32_t key_document[kBlock] = {};
  if (documents == Documents::kMixed) std::copy_n(pair.key_document, pair.keys, key_document);
  for (std::int64_t r = 0; r < pair.queries; ++r) {
    const auto visible = static_cast<std::int32_t>(pair.diagonal ? r + 1 : pair.keys);
    for (std::int64_t v = 0; v < kBlockVectors; ++v) {
      float* s = scores + r * kBlock + v * kLanes;
      f32x16 x = load(s);
      const i32x16 key = lane_index() + splat(static_cast<std::int32_t>(v * kLanes));
      x = key < splat(visible) ? x : minus_infinity;
      if (pair.cut()) x = key < splat(static_cast<std::int32_t>(r + pair.begin)) ? minus_infinity : x;
      if (documents == Documents::kMixed) {
        i32x16 id;
        std::memcpy(&id, key_document + v * kLanes, sizeof id);
        x = id == splat(pair.query_document[r]) ? x : minus_infinity;
      }
      store(s, x);
    }
  }
}

// scores[r, c] = q_r . k_c, masked. q: [queries, ldq]; keys_DS: [units of depth, kBlock].
template <class Form, class Unit>
inline void block_scores(float* scores, const BlockPair& pair, Documents documents, const Unit* q,
                         std::int64_t ldq, const Unit* keys_DS, std::int64_t depth) {
  const BlockProduct<Unit> product{scores, kBlock, q, ldq, keys_DS, kBlock, pair.queries, kBlock, depth};
  if (pair.diagonal) {
    Form::template multiply<false, false, Causal::kKeyColumns>(product);
  } else {
    Form::template multiply<false, false, Causal::kFull>(product);
  }
  mask_scores(scores, pair, documents);
}

}  // namespace upmoe::cpu
