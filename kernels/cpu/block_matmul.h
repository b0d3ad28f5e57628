#pragma once
// Products of blocks that lie packed in the cache, in registers: the inner loops of attention.

#include <algorithm>

#include "kernels/cpu/units.h"

namespace upmoe::cpu {

// c[m, n] (+)= sum over k of a(m, k) b[k, n]. b and c are row-major with whole vectors of columns; a(m, k) is
// a[m * lda + k], or a[k * lda + m] when kTransposeA. k, depth and the strides of a and b count units.
template <class Unit>
struct BlockProduct {
  float* c;
  std::int64_t ldc;
  const Unit* a;
  std::int64_t lda;
  const Unit* b;
  std::int64_t ldb;
  std::int64_t rows, columns, depth;
};

// Which part of a product a causal block on the diagonal needs. "Above" means index of the key > index of the query.
enum class Causal {
  kFull,        // not on the diagonal
  kKeyColumns,  // rows are queries, columns keys: columns above the tile's last row are not computed
  kKeyDepth,    // rows are queries, the sum runs over keys: a(m, key) = 0 for key > m
  kQueryDepth,  // rows are keys, the sum runs over queries: a(m, query) = 0 for query < m
};

constexpr std::int64_t round_to_lanes(std::int64_t n) {
  return (n + kLanes - 1) / kLanes * kLanes;
}

template <int kRows, int kRegisters, bool kTransposeA, bool kAdd, class Unit>
[[gnu::always_inline]] inline void product_columns(float* c, std::int64_t ldc, const Unit* a,
                                                   std::int64_t lda, const Unit* b, std::int64_t ldb,
                                                   std::int64_t depth) {
  Register sum[kRows][kRegisters];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 16
    for (int r = 0; r < kRegisters; ++r)
      sum[m][r] = kAdd ? load_register(c + m * ldc + r * kRegisterLanes) : Register{};
  for (std::int64_t k = 0; k < depth; ++k) {
    decltype(load_unit_register(b)) b_k[kRegisters];
#pragma GCC unroll 16
    for (int r = 0; r < kRegisters; ++r) b_k[r] = load_unit_register(b + k * ldb + r * kRegisterLanes);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      const Unit a_mk = kTransposeA ? a[k * lda + m] : a[m * lda + k];
#pragma GCC unroll 16
      for (int r = 0; r < kRegisters; ++r) sum[m][r] = multiply_add(sum[m][r], a_mk, b_k[r]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 16
    for (int r = 0; r < kRegisters; ++r) store_register(c + m * ldc + r * kRegisterLanes, sum[m][r]);
}

template <int kRows, int kVectors, bool kTransposeA, bool kAdd, class Unit>
inline void product_tile(float* c, std::int64_t ldc, const Unit* a, std::int64_t lda, const Unit* b,
                         std::int64_t ldb, std::int64_t depth) {
  constexpr int kAtOnce = std::min(kVectors, kVectorsAtOnce);
  static_assert(kVectors % kAtOnce == 0);
  for (int v = 0; v < kVectors; v += kAtOnce)
    product_columns<kRows, kAtOnce * kLanes / kRegisterLanes, kTransposeA, kAdd>(c + v * kLanes, ldc, a, lda,
                                                                                 b + v * kLanes, ldb, depth);
}

// The first `vectors` (at most kVectors) vectors of columns of a tile.
template <int kRows, int kVectors, bool kTransposeA, bool kAdd, class Unit>
inline void narrow_tile(std::int64_t vectors, float* c, std::int64_t ldc, const Unit* a, std::int64_t lda,
                        const Unit* b, std::int64_t ldb, std::int64_t depth) {
  if constexpr (kVectors > 1) {
    if (vectors < kVectors)
      return narrow_tile<kRows, kVectors - 1, kTransposeA, kAdd>(vectors, c, ldc, a, lda, b, ldb, depth);
  }
  product_tile<kRows, kVectors, kTransposeA, kAdd>(c, ldc, a, lda, b, ldb, depth);
}

// All rows from m on of one panel of kVectors columns.
template <int kRows, int kVectors, bool kTransposeA, bool kAdd, Causal kCausal, class Unit>
inline void product_panel(const BlockProduct<Unit>& p, std::int64_t first_column, std::int64_t m) {
  for (; m + kRows <= p.rows; m += kRows) {
    // Units that a diagonal cuts are taken whole: their other half is zero.
    const std::int64_t begin = kCausal == Causal::kQueryDepth ? std::min(m / kPerUnit<Unit>, p.depth) : 0;
    const std::int64_t end =
        kCausal == Causal::kKeyDepth ? std::min(p.depth, units_of<Unit>(m + kRows)) : p.depth;
    float* c = p.c + m * p.ldc + first_column;
    const Unit* a = kTransposeA ? p.a + begin * p.lda + m : p.a + m * p.lda + begin;
    const Unit* b = p.b + begin * p.ldb + first_column;
    if constexpr (kCausal == Causal::kKeyColumns) {
      const std::int64_t visible = m + kRows - first_column;  // columns of the panel that its last row sees
      if (visible <= 0) continue;
      narrow_tile<kRows, kVectors, kTransposeA, kAdd>((visible + kLanes - 1) / kLanes, c, p.ldc, a, p.lda, b,
                                                      p.ldb, p.depth);
    } else {
      product_tile<kRows, kVectors, kTransposeA, kAdd>(c, p.ldc, a, p.lda, b, p.ldb, end - begin);
    }
  }
  if constexpr (kRows > 1) {
    if (m < p.rows) product_panel<kRows - 1, kVectors, kTransposeA, kAdd, kCausal>(p, first_column, m);
  }
}

// What is left of the columns, in one panel.
template <int kVectors, bool kTransposeA, bool kAdd, Causal kCausal, class Unit>
inline void last_panel(const BlockProduct<Unit>& p, std::int64_t first_column) {
  if constexpr (kVectors > 1) {
    if (p.columns - first_column < kVectors * kLanes)
      return last_panel<kVectors - 1, kTransposeA, kAdd, kCausal>(p, first_column);
  }
  product_panel<6, kVectors, kTransposeA, kAdd, kCausal>(p, first_column, 0);
}

template <bool kTransposeA, bool kAdd, Causal kCausal, class Unit>
inline void block_product(const BlockProduct<Unit>& p) {
  constexpr int kPanel = 4;
  std::int64_t n = 0;
  for (; n + kPanel * kLanes <= p.columns; n += kPanel * kLanes)
    product_panel<6, kPanel, kTransposeA, kAdd, kCausal>(p, n, 0);
  if (n < p.columns) last_panel<kPanel - 1, kTransposeA, kAdd, kCausal>(p, n);
}

}  // namespace upmoe::cpu
