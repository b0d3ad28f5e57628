#include "parallel/reduce.h"

#include <algorithm>
#include <type_traits>

namespace upmoe {

namespace {

// Blocks that stay in cache, so each part is read once.
constexpr std::int64_t kBlock = 2048;

template <class T, class Wide>
Wide widen(T v) {
  if constexpr (std::is_same_v<T, bf16>) {
    return to_float(v);
  } else {
    return v;
  }
}

// The operation is a type, not a value: a choice inside the inner loop would keep it from being vectorised.
template <class T, class Wide, class Combine>
void reduce_typed(std::byte* out, std::span<const std::byte* const> parts, std::int64_t elements,
                  const Combine& combine) {
  // Part by part, as whoever reduces has them in memory: rank 0's values first, then rank 1's added to each, and so on.
  Wide sum[kBlock];
  for (std::int64_t begin = 0; begin < elements; begin += kBlock) {
    const std::int64_t n = std::min(kBlock, elements - begin);
    for (std::size_t p = 0; p < parts.size(); ++p) {
      const T* in = reinterpret_cast<const T*>(parts[p]) + begin;
      if (p == 0) {
        for (std::int64_t i = 0; i < n; ++i) sum[i] = widen<T, Wide>(in[i]);
      } else {
        for (std::int64_t i = 0; i < n; ++i) sum[i] = combine(sum[i], widen<T, Wide>(in[i]));
      }
    }
    T* to = reinterpret_cast<T*>(out) + begin;
    for (std::int64_t i = 0; i < n; ++i) {
      if constexpr (std::is_same_v<T, bf16>) {
        to[i] = to_bf16(sum[i]);
      } else {
        to[i] = static_cast<T>(sum[i]);
      }
    }
  }
}

template <class T, class Wide>
void reduce_by(ReduceOp op, std::byte* out, std::span<const std::byte* const> parts, std::int64_t elements) {
  switch (op) {
    case ReduceOp::kSum:
      return reduce_typed<T, Wide>(out, parts, elements, [](Wide a, Wide b) { return a + b; });
    case ReduceOp::kMax:
      return reduce_typed<T, Wide>(out, parts, elements, [](Wide a, Wide b) { return a < b ? b : a; });
    case ReduceOp::kMin:
      return reduce_typed<T, Wide>(out, parts, elements, [](Wide a, Wide b) { return b < a ? b : a; });
  }
}

}  // namespace

void reduce_in_order(DType dtype, ReduceOp op, std::byte* out, std::span<const std::byte* const> parts,
                     std::int64_t elements) {
  switch (dtype) {
    case DType::kF32:
      return reduce_by<float, double>(op, out, parts, elements);
    case DType::kBF16:
      return reduce_by<bf16, float>(op, out, parts, elements);
    case DType::kF64:
      return reduce_by<double, double>(op, out, parts, elements);
    case DType::kI32:
      return reduce_by<std::int32_t, std::int32_t>(op, out, parts, elements);
    case DType::kI64:
      return reduce_by<std::int64_t, std::int64_t>(op, out, parts, elements);
    case DType::kU8:
      UPMOE_CHECK(false, "bytes are moved, not summed");
  }
}

}  // namespace upmoe
