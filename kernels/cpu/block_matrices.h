#pragma once
// Products of attention's blocks in matrix registers: what block_matmul.h computes in vectors. Blocks are read whole,
// 64 rows and whole registers of depth, whatever is asked of them: behind the last row may stand anything, behind the
// last of the depth zeros.

#include <algorithm>

#include "kernels/cpu/block_matmul.h"
#include "kernels/cpu/matrix_product.h"

namespace upmoe::cpu {

// Rows of the same pairs that a transposed first factor has as columns: to[m][u] = from[u][m], for 64 of both; pairs
// past `units` are zero.
inline void turn_units(std::uint32_t* to, const std::uint32_t* from, std::int64_t stride, std::int64_t rows,
                       std::int64_t units) {
  constexpr std::int64_t kUnits = 2 * kLanes;
  for (std::int64_t m = 0; m < rows; m += kLanes)
    for (std::int64_t u = 0; u < kUnits; u += kLanes) {
      u32x16 block[kLanes] = {};
      for (std::int64_t i = 0; i < std::min(kLanes, units - u); ++i)
        std::memcpy(&block[i], from + (u + i) * stride + m, sizeof block[i]);
      transpose(block);
      for (std::int64_t i = 0; i < kLanes; ++i)
        std::memcpy(to + (m + i) * kUnits + u, &block[i], sizeof block[i]);
    }
}

// 32 rows at a time; what lies behind a diagonal is left out by whole registers of depth, or pairs of them of columns.
template <class Registers, bool kAdd, Causal kCausal>
inline void multiply_block_rows(const BlockProduct<std::uint32_t>& p) {
  constexpr std::int64_t kRows = 2 * kMatrixRows;
  const std::int64_t steps = (p.depth + kMatrixRows - 1) / kMatrixRows;
  for (std::int64_t m = 0; m < p.rows; m += kRows) {
    // Pairs of keys or queries: 32 of them are one step.
    const std::int64_t begin = kCausal == Causal::kQueryDepth ? m / kRows : 0;
    const std::int64_t end = kCausal == Causal::kKeyDepth ? std::min(steps, m / kRows + 1) : steps;
    const std::int64_t columns = kCausal == Causal::kKeyColumns ? std::min(p.columns, m + kRows) : p.columns;
    const std::uint32_t* a = p.a + m * p.lda + begin * kMatrixRows;
    multiply_matrices<Registers, kAdd>(
        {p.c + m * p.ldc,
         p.ldc,
         {a, p.lda, kMatrixRows, kMatrixRows * p.lda},
         {p.b + begin * kMatrixRows * p.ldb, p.ldb, kMatrixRows * p.ldb, kMatrixRows},
         std::max<std::int64_t>(0, end - begin)},
        p.rows - m, columns);
  }
}

template <class Registers, bool kTransposeA, bool kAdd, Causal kCausal>
inline void block_product_in_matrices(BlockProduct<std::uint32_t> p) {
  if constexpr (kTransposeA) {
    alignas(64) std::uint32_t rows[64 * 2 * kLanes];
    turn_units(rows, p.a, p.lda, p.rows, p.depth);
    p.a = rows;
    p.lda = 2 * kLanes;
    multiply_block_rows<Registers, kAdd, kCausal>(p);
  } else {
    multiply_block_rows<Registers, kAdd, kCausal>(p);
  }
}

}  // namespace upmoe::cpu
