#include "kernels/ops/attention_decode.h"

#include "kernels/ops/check_tensor.h"
#include "kernels/ops/dispatch.h"

namespace upmoe::ops {

namespace {

void check_cached(const Exec& ex, const ConstTensorView& qkv_TH, const KeyCache& cache,
                  const CachedTokens& tokens, const AttentionShape& s,
                  std::source_location where = std::source_location::current()) {
  check_float(qkv_TH, "qkv_TH", where);
  const bool sizes = s.heads > 0 && s.kv_heads > 0 && s.head_dim > 0 && s.window >= 0;
  if (!sizes || s.heads % s.kv_heads != 0)
    fail_check("kv_heads divides heads", where,
               fmt::format("heads {}, kv_heads {}, head_dim {}, window {}", s.heads, s.kv_heads, s.head_dim,
                           s.window));
  const std::int64_t T = qkv_TH.rows();
  check_tensor(ex, qkv_TH, {T, s.qkv_width()}, qkv_TH.dtype, "qkv_TH", where);
  check_tensor(ex, tokens.row_T, {T}, DType::kI32, "row_T", where);
  check_tensor(ex, tokens.position_T, {T}, DType::kI32, "position_T", where);
  if (tokens.run < 0 || tokens.run > T)
    fail_check("a run of some of the tokens", where, fmt::format("run {} of {} tokens", tokens.run, T));
  const Shape& kept = cache.k_BSK.shape;
  if (kept.rank != 3) fail_check("a cache of rows, slots and keys", where, kept.str());
  const Shape expected{kept[0], kept[1], s.kv_heads * s.head_dim};
  check_tensor(ex, cache.k_BSK, expected, qkv_TH.dtype, "k_BSK", where);
  check_tensor(ex, cache.v_BSK, expected, qkv_TH.dtype, "v_BSK", where);
}

}  // namespace

void store_keys(Exec& ex, const KeyCache& cache, ConstTensorView qkv_TH, const CachedTokens& tokens,
                AttentionShape shape) {
  check_cached(ex, qkv_TH, cache, tokens, shape);
  const double bytes =
      static_cast<double>(qkv_TH.rows() * shape.kv_width()) * static_cast<double>(size_of(qkv_TH.dtype));
  ex.book("store_keys", 0, bytes + bytes_of(tokens.row_T) + bytes_of(tokens.position_T), bytes);
  dispatch(ex, &Backend::store_keys, cache, qkv_TH, tokens, shape);
}

void attention_decode(Exec& ex, TensorView out_TQ, ConstTensorView qkv_TH, const KeyCache& cache,
                      const CachedTokens& tokens, AttentionShape shape) {
  check_cached(ex, qkv_TH, cache, tokens, shape);
  check_scratch(ex);
  const std::int64_t Q = shape.heads * shape.head_dim;
  check_tensor(ex, out_TQ, {qkv_TH.rows(), Q}, qkv_TH.dtype, "out_TQ");
  const double seen = static_cast<double>(tokens.seen), size = static_cast<double>(size_of(qkv_TH.dtype));
  ex.book("attention_decode", 4.0 * seen * static_cast<double>(Q),
          bytes_of(out_TQ) + seen * static_cast<double>(shape.kv_width()) * size + bytes_of(tokens.row_T) +
              bytes_of(tokens.position_T),
          bytes_of(out_TQ), Work::kAttention);
  dispatch(ex, &Backend::attention_decode, out_TQ, qkv_TH, cache, tokens, shape);
}

}  // namespace upmoe::ops
