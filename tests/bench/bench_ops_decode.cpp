// What a step of generation computes with: products of few rows, and attention over what is kept of their tokens.

#include "kernels/ops/attention_decode.h"
#include "tests/bench/op_bench.h"

namespace upmoe::bench {

namespace {

// A weight beyond the caches, so that its speed is that of the memory.
void add_products(std::int64_t rows, DType dtype) {
  const std::int64_t n = 16384, k = 1024;
  for (const bool row_by_row : {true, false})
    add(fmt::format("gemm_{}/{}", row_by_row ? "row_by_row" : "forward", rows), dtype,
        [=](benchmark::State& state) {
          const Tensor x({rows, k}, dtype), w({n, k}, dtype), y({rows, n}, dtype);
          measure(state, dtype, [&](Exec& ex) {
            Exec one = ex;
            one.row_by_row = row_by_row;
            ops::gemm(one, y.view, {x.view}, {w.view, Transpose::kYes}, Accumulate::kOverwrite);
          });
        });
}

// Rows of 4096 tokens each, all but the newest kept.
void add_attention(std::int64_t rows, DType dtype) {
  const AttentionShape s{16, 4, 128, 0};
  const std::int64_t kept = 4096;
  add(fmt::format("attention_decode/{}", rows), dtype, [=](benchmark::State& state) {
    const Tensor qkv({rows, s.qkv_width()}, dtype), out({rows, s.heads * s.head_dim}, dtype),
        k({rows, kept, s.kv_heads * s.head_dim}, dtype), v({rows, kept, s.kv_heads * s.head_dim}, dtype),
        row({rows}, DType::kI32), position({rows}, DType::kI32);
    for (std::int64_t r = 0; r < rows; ++r) {
      row.view.as<std::int32_t>()[r] = static_cast<std::int32_t>(r);
      position.view.as<std::int32_t>()[r] = static_cast<std::int32_t>(kept) - 1;
    }
    const CachedTokens tokens{row.view, position.view, rows * kept};
    measure(state, dtype, [&](Exec& ex) {
      ops::attention_decode(ex, out.view, qkv.view, {k.view, v.view}, tokens, s);
    });
  });
}

// A later chunk of a prompt, over 3072 tokens before it, by blocks and token by token.
void add_chunks(DType dtype) {
  const AttentionShape s{16, 4, 128, 0};
  const std::int64_t before = 3072, n = 1024, kept = before + n;
  for (const bool as_run : {true, false})
    add(as_run ? "attention_chunk" : "attention_chunk_by_tokens", dtype, [=](benchmark::State& state) {
      const Tensor qkv({n, s.qkv_width()}, dtype), out({n, s.heads * s.head_dim}, dtype),
          k({1, kept, s.kv_heads * s.head_dim}, dtype), v({1, kept, s.kv_heads * s.head_dim}, dtype),
          row({n}, DType::kI32), position({n}, DType::kI32);
      for (std::int64_t t = 0; t < n; ++t) {
        row.view.as<std::int32_t>()[t] = 0;
        position.view.as<std::int32_t>()[t] = static_cast<std::int32_t>(before + t);
      }
      const CachedTokens tokens{row.view, position.view, n * before + n * (n + 1) / 2, as_run ? n : 0};
      measure(state, dtype, [&](Exec& ex) {
        ops::attention_decode(ex, out.view, qkv.view, {k.view, v.view}, tokens, s);
      });
    });
}

}  // namespace

void add_decode() {
  for (const DType dtype : kFloats) add_chunks(dtype);
  for (const DType dtype : kFloats)
    for (const std::int64_t rows : {1, 4, 16}) {
      add_products(rows, dtype);
      add_attention(rows, dtype);
    }
}

}  // namespace upmoe::bench
