#include "trainer/model/key_cache.h"

namespace upmoe {

namespace {

// Of one layer's keys, and as many of its values; whole lines of 64 bytes.
std::int64_t elements_of(const AttentionShape& shape, std::int64_t rows, std::int64_t slots) {
  const std::int64_t all = checked_mul(checked_mul(rows, slots), checked_mul(shape.kv_heads, shape.head_dim));
  return checked_add(all, 31) / 32 * 32;
}

}  // namespace

std::int64_t KeyCaches::bytes_of(const std::vector<AttentionShape>& blocks, std::int64_t rows,
                                 std::int64_t slots, DType dtype) {
  std::int64_t total = 0;
  for (const AttentionShape& block : blocks)
    total = checked_add(total, checked_mul(2, elements_of(block, rows, slots)));
  return checked_mul(total, static_cast<std::int64_t>(size_of(dtype)));
}

KeyCaches::KeyCaches(Arena& keep, const std::vector<AttentionShape>& blocks, std::int64_t rows,
                     std::int64_t slots, DType dtype) {
  const std::int64_t bytes = bytes_of(blocks, rows, slots, dtype);
  bytes_ = static_cast<std::size_t>(bytes);
  const TensorView all =
      keep.take({bytes / static_cast<std::int64_t>(size_of(dtype))}, dtype, "keys and values of tokens");
  std::int64_t at = 0;
  const auto next = [&](const AttentionShape& block) {
    const Shape shape{rows, slots, block.kv_heads * block.head_dim};
    const TensorView view = all.rows(at, at + shape.elements()).reshape(shape);
    at += elements_of(block, rows, slots);
    return view;
  };
  for (const AttentionShape& block : blocks) {
    const TensorView keys = next(block);
    caches_.push_back({keys, next(block)});
  }
}

}  // namespace upmoe
