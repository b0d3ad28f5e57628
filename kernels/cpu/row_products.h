#pragma once
// Products y = x w^T (+ bias) of few rows, as generation has them: every weight is read from memory once, and a row has
// the same bits whatever rows are computed with it. Their speed is that of the memory; many rows are faster by
// packed blocks or oneDNN, which copy the weights first, and few rows of bf16 in matrix registers, where there are
// some.

#include <algorithm>
#include <cstring>
#include <span>

#include "kernels/core/tensor.h"
#include "kernels/cpu/matrix_registers.h"
#include "kernels/cpu/parallel_for.h"
#include "kernels/cpu/units.h"

namespace upmoe::cpu {

// Whether they are better computed as many rows are: in matrix registers sixteen rows cost what one does, a weight that
// few rows use is read where it lies, and a row is the same beside any others there too.
inline bool few_rows_are_packed(DType dtype) {
  return dtype == DType::kBF16 && has_matrix_registers();
}

// y [rows, columns], x [rows, depth], w [columns, depth]; bias [columns] or null.
template <class T, class Out>
struct RowProduct {
  Out* y;
  const T *x, *w, *bias;
  std::int64_t rows, columns, depth;
};

// What a register holds of a row: numbers, or pairs of bf16 as they lie.
template <class T>
constexpr std::int64_t kOfARegister = kPerUnit<UnitOf<T>> == 2 ? 2 * kRegisterLanes : kRegisterLanes;

template <class T>
inline auto load_of_row(const T* p) {
  if constexpr (kPerUnit<UnitOf<T>> == 1) {
    return load_register(p);
  } else {
    return load_units(p, kOfARegister<T>);
  }
}

// Those past n read as zero.
template <class T>
inline auto load_of_row(const T* p, std::int64_t n) {
  if constexpr (kPerUnit<UnitOf<T>> == 1) {
    float block[kRegisterLanes] = {};
    for (std::int64_t i = 0; i < n; ++i) block[i] = to_float(p[i]);
    return load_register(block);
  } else {
    return load_units(p, n);
  }
}

// Always in the same order.
template <class R>
inline float lane_sum(R r) {  // a template, so that the branch of another width is not compiled
  if constexpr (sizeof(R) == sizeof(f32x16)) {
    return reduce_add(r);
  } else {
    float sum = r[0];
    for (int i = 1; i < kRegisterLanes; ++i) sum += r[i];
    return sum;
  }
}

// Asks for n bytes from p on, a few lines of a cache at most. They need not be there.
inline void fetch_ahead(const char* p, std::int64_t n) {
  constexpr std::int64_t kLine = 64;
  for (std::int64_t i = 0; i < n; i += kLine) __builtin_prefetch(p + i);
}

// y of R rows by C columns from (m, n) on.
template <int R, int C, class T, class Out>
inline void store_row_tile(const RowProduct<T, Out>& p, std::int64_t m, std::int64_t n,
                           Register (&sum)[R][C]) {
  float bias[C] = {};
  for (int c = 0; p.bias != nullptr && c < C; ++c) bias[c] = to_float(p.bias[n + c]);
  alignas(64) Out tile[R * C];
  if constexpr (R * C == kLanes && sizeof(Register) == sizeof(f32x16)) {
    f32x16 sums[kLanes], biases;
#pragma GCC unroll 16
    for (int i = 0; i < R * C; ++i) {
      sums[i] = sum[i / C][i % C];
      biases[i] = bias[i % C];
    }
    store(tile, reduce_add_each(sums) + biases);
  } else {
    for (int i = 0; i < R * C; ++i) tile[i] = from_float<Out>(lane_sum(sum[i / C][i % C]) + bias[i % C]);
  }
  for (int r = 0; r < R; ++r)
    std::memcpy(static_cast<void*>(p.y + (m + r) * p.columns + n), tile + r * C, C * sizeof(Out));
}

// A value's terms are added lane by lane along the depth, in every tile alike. `ahead`: as many weights as the tile
// reads, that are read next; null for none.
template <int R, int C, class T, class Out>
inline void multiply_row_tile(const RowProduct<T, Out>& p, std::int64_t m, std::int64_t n,
                              const char* ahead = nullptr) {
  constexpr std::int64_t kAtOnce = kOfARegister<T>, kStep = kAtOnce * C * sizeof(T);
  const std::int64_t K = p.depth, whole = K / kAtOnce * kAtOnce;
  const T *x_rows = p.x + m * K, *w_rows = p.w + n * K;
  Register sum[R][C] = {};
  const auto add = [&](auto load) {
    decltype(load(w_rows)) w[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) w[c] = load(w_rows + c * K);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const auto x = load(x_rows + r * K);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sum[r][c] = multiply_add(sum[r][c], x, w[c]);
    }
  };
  for (std::int64_t k = 0; k < whole; k += kAtOnce) {
    if (ahead != nullptr) fetch_ahead(ahead + k / kAtOnce * kStep, kStep);
    add([k](const T* row) { return load_of_row(row + k); });
  }
  if (whole < K) add([&](const T* row) { return load_of_row(row + whole, K - whole); });
  store_row_tile(p, m, n, sum);
}

constexpr int kRowsAtOnce = kVectorsAtOnce == 4 ? 4 : 2;  // whose sums, of four columns, fit the registers

// C columns from n on stay in the nearest cache while all rows go by. Of bf16 a processor guesses too little of what is
// read next, as its rows of weights are short: asking for it nearly doubles the speed of one row. Of fp32 it guesses
// enough.
template <int C, class T, class Out>
inline void multiply_columns(const RowProduct<T, Out>& p, std::int64_t n, std::int64_t end) {
  const char* ahead = sizeof(T) < sizeof(float) && n + 2 * C <= end
                          ? reinterpret_cast<const char*>(p.w + (n + C) * p.depth)
                          : nullptr;
  std::int64_t m = 0;
  for (; m + kRowsAtOnce <= p.rows; m += kRowsAtOnce, ahead = nullptr)
    multiply_row_tile<kRowsAtOnce, C>(p, m, n, ahead);
  for (; m < p.rows; ++m, ahead = nullptr) multiply_row_tile<1, C>(p, m, n, ahead);
}

// Several at once, of one depth and as many columns; those without rows are passed over.
template <class T, class Out>
void multiply_row_products(std::span<const RowProduct<T, Out>> products) {
  if (products.empty()) return;
  constexpr std::int64_t kColumns = 64;  // of a task
  const std::int64_t blocks = (products.front().columns + kColumns - 1) / kColumns;
  parallel_tasks(static_cast<std::int64_t>(products.size()) * blocks, [&](std::int64_t i, std::int64_t) {
    const RowProduct<T, Out>& p = products[static_cast<std::size_t>(i / blocks)];
    const std::int64_t begin = i % blocks * kColumns, end = std::min(p.columns, begin + kColumns);
    if (p.rows == 0) return;
    std::int64_t n = begin;
    for (; n + 4 <= end; n += 4) multiply_columns<4>(p, n, end);
    for (; n < end; ++n) multiply_columns<1>(p, n, end);
  });
}

}  // namespace upmoe::cpu
