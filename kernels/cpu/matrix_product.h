#pragma once
// Sums of products in matrix registers: two of rows by two of columns, whose four sums stay in four more.
//
//                  b, pairs of depth
//                 +-------+-------+
//                 | 6     | 7     |       the numbers of the registers
//   a     +-------+=======+=======+
//  rows   | 4     | 0     | 1     |
//  of     | 5     | 2     | 3     |
//  pairs  +-------+=======+=======+

#include "kernels/cpu/matrix_registers.h"

namespace upmoe::cpu {

// Registers of a: 16 rows of 16 pairs of depth, or of b: 16 pairs of depth of 16 columns. All strides in units: from a
// register's row to the next, from 16 pairs of depth to the next 16, from 16 rows or columns to the next 16.
struct MatrixFactor {
  const std::uint32_t* data;
  std::int64_t row_stride, step_stride, tile_stride;
};

// c[m][n] (+)= sum over 16 * steps pairs of a[m] and b[n]; c's rows stand c_stride apart.
struct MatrixProduct {
  float* c;
  std::int64_t c_stride;
  MatrixFactor a, b;
  std::int64_t steps;
};

// kRows x kColumns registers of sums.
template <class R, bool kAdd, int kRows, int kColumns>
inline void multiply_registers(const MatrixProduct& p) {
  const std::int64_t c_stride = 4 * p.c_stride, a_stride = 4 * p.a.row_stride, b_stride = 4 * p.b.row_stride;
  const auto for_sums = [&](auto with) {
    with(std::integral_constant<int, 0>{}, p.c);
    if constexpr (kColumns > 1) with(std::integral_constant<int, 1>{}, p.c + kMatrixRows);
    if constexpr (kRows > 1) with(std::integral_constant<int, 2>{}, p.c + kMatrixRows * p.c_stride);
    if constexpr (kRows > 1 && kColumns > 1)
      with(std::integral_constant<int, 3>{}, p.c + kMatrixRows * p.c_stride + kMatrixRows);
  };
  for_sums([&]<int kSum>(std::integral_constant<int, kSum>, float* c) {
    if constexpr (kAdd) {
      R::template load<kSum>(c, c_stride);
    } else {
      R::template zero<kSum>();
    }
  });
  const std::uint32_t *a = p.a.data, *b = p.b.data;
  for (std::int64_t s = 0; s < p.steps; ++s, a += p.a.step_stride, b += p.b.step_stride) {
    R::template load<4>(a, a_stride);
    R::template load<6>(b, b_stride);
    R::template multiply_add<0, 4, 6>();
    if constexpr (kColumns > 1) {
      R::template load<7>(b + p.b.tile_stride, b_stride);
      R::template multiply_add<1, 4, 7>();
    }
    if constexpr (kRows > 1) {
      R::template load<5>(a + p.a.tile_stride, a_stride);
      R::template multiply_add<2, 5, 6>();
      if constexpr (kColumns > 1) R::template multiply_add<3, 5, 7>();
    }
  }
  for_sums(
      [&]<int kSum>(std::integral_constant<int, kSum>, float* c) { R::template store<kSum>(c, c_stride); });
}

// Up to 32 rows and all columns, which come in whole registers: whole ones of c are written.
template <class R, bool kAdd>
inline void multiply_matrices(MatrixProduct p, std::int64_t rows, std::int64_t columns) {
  const bool two = rows > kMatrixRows;
  for (; columns >= 2 * kMatrixRows; columns -= 2 * kMatrixRows) {
    two ? multiply_registers<R, kAdd, 2, 2>(p) : multiply_registers<R, kAdd, 1, 2>(p);
    p.c += 2 * kMatrixRows;
    p.b.data += 2 * p.b.tile_stride;
  }
  if (columns == 0) return;
  // Rows that come from memory are read faster sixteen at a time.
  multiply_registers<R, kAdd, 1, 1>(p);
  if (!two) return;
  p.c += kMatrixRows * p.c_stride;
  p.a.data += p.a.tile_stride;
  multiply_registers<R, kAdd, 1, 1>(p);
}

}  // namespace upmoe::cpu
