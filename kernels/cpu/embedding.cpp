#include "kernels/ops/embedding.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "kernels/cpu/parallel_for.h"
#include "kernels/cpu/simd.h"
#include "kernels/ops/backend.h"
#include "kernels/ops/findings.h"

namespace upmoe::cpu {

namespace {

void check_tokens(const std::int32_t* tokens, std::int64_t count, std::int64_t vocab) {
  for (std::int64_t t = 0; t < count; ++t)
    if (tokens[t] < 0 || tokens[t] >= vocab) fail_token(tokens[t], t, vocab);
}

// The positions whose token lies in [begin, begin + rows), in order; returns how many.
std::int64_t held_positions(const std::int32_t* tokens, std::int64_t count, std::int64_t begin,
                            std::int64_t rows, std::int32_t* out) {
  std::int64_t held = 0;
  for (std::int64_t t = 0; t < count; ++t)
    if (tokens[t] >= begin && tokens[t] < begin + rows) out[held++] = static_cast<std::int32_t>(t);
  return held;
}

// Sorts `count` positions, held in `from`, by their tokens, equal tokens in the order of their positions: a
// radix sort, eight bits at a time, between two arrays; returns the one that holds the result.
const std::int32_t* sort_positions(const std::int32_t* tokens, std::int64_t count, std::int64_t vocab,
                                   std::int32_t* from, std::int32_t* to) {
  for (int shift = 0; shift < 32 && ((vocab - 1) >> shift) > 0; shift += 8) {
    std::array<std::int64_t, 257> begin{};
    const auto digit = [&](std::int64_t i) {
      return static_cast<std::size_t>((tokens[from[i]] >> shift) & 255);
    };
    // begin[d + 1] counts digit d; summed up, begin[d] is where its first position goes, then where its next one goes.
    for (std::int64_t i = 0; i < count; ++i) ++begin[digit(i) + 1];
    for (std::size_t d = 0; d < 256; ++d) begin[d + 1] += begin[d];
    for (std::int64_t i = 0; i < count; ++i) to[begin[digit(i)]++] = from[i];
    std::swap(from, to);
  }
  return from;
}

// dw += the rows of dx at these positions, rounded once. Columns outside, so that sums stay in registers.
template <class T, class Out>
void add_rows(Out* dw, const T* dx, const std::int32_t* positions, std::int64_t count, std::int64_t width) {
  for_lanes(width, [&](std::int64_t i, auto lanes) {
    f32x16 sum = load(dw + i, lanes);
    for (std::int64_t p = 0; p < count; ++p) sum += load(dx + positions[p] * width + i, lanes);
    store(dw + i, sum, lanes);
  });
}

}  // namespace

void embedding_forward(Exec&, TensorView x_TD, ConstTensorView tokens_T, ConstTensorView w_VD,
                       VocabShard shard) {
  const std::int64_t count = tokens_T.shape[0], rows = w_VD.shape[0];
  const auto* tokens = tokens_T.as<std::int32_t>();
  check_tokens(tokens, count, shard.total);
  const std::int64_t width = w_VD.shape[1];
  const std::size_t row_bytes = static_cast<std::size_t>(width) * size_of(w_VD.dtype);
  if (row_bytes == 0) return;
  parallel_for(count, width, [&](std::int64_t t) {
    std::byte* x = x_TD.data + static_cast<std::size_t>(t) * row_bytes;
    const std::int64_t row = tokens[t] - shard.begin;
    if (row < 0 || row >= rows) {
      std::memset(x, 0, row_bytes);
    } else {
      std::memcpy(x, w_VD.data + static_cast<std::size_t>(row) * row_bytes, row_bytes);
    }
  });
}

void embedding_backward(Exec& ex, GradientView dw_VD, ConstTensorView dx_TD, ConstTensorView tokens_T,
                        VocabShard shard) {
  const std::int64_t all = tokens_T.shape[0], width = dw_VD.shape[1];
  const auto* tokens = tokens_T.as<std::int32_t>();
  check_tokens(tokens, all, shard.total);
  if (!dw_VD.adds()) fill(ex, dw_VD, 0.0f);
  ScratchScope scope(*ex.scratch);
  auto* memory = ex.scratch->take({3, all + 1}, DType::kI32, "embedding_backward order").as<std::int32_t>();
  const std::int64_t count = held_positions(tokens, all, shard.begin, dw_VD.shape[0], memory);
  const std::int32_t* order = sort_positions(tokens, count, shard.total, memory, memory + all + 1);
  auto* first = memory + 2 * (all + 1);  // of each distinct token, in `order`
  std::int64_t distinct = 0;
  for (std::int64_t i = 0; i < count; ++i)
    if (i == 0 || tokens[order[i]] != tokens[order[i - 1]]) first[distinct++] = static_cast<std::int32_t>(i);
  first[distinct] = static_cast<std::int32_t>(count);
  with_float_type(dx_TD.dtype, [&](auto in_type) {
    using T = decltype(in_type);
    const auto add_all = [&](auto* dw) {
      const T* dx = dx_TD.as<T>();
      // One task per distinct token: one writer per row, and its sum in the order of positions.
      const std::int64_t rows_each = distinct > 0 ? (count + distinct - 1) / distinct : 0;
      parallel_for(distinct, rows_each * width, [&](std::int64_t i) {
        const std::int64_t row = tokens[order[first[i]]] - shard.begin;
        add_rows(dw + row * width, dx, order + first[i], first[i + 1] - first[i], width);
      });
    };
    if (dw_VD.dtype == DType::kF32) return add_all(dw_VD.as<float>());
    add_all(dw_VD.as<bf16>());
  });
}

}  // namespace upmoe::cpu
