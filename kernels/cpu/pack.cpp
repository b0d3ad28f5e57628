#include "kernels/ops/pack.h"

#include <algorithm>
#include <concepts>
#include <cstring>

#include "kernels/cpu/parallel_for.h"
#include "kernels/cpu/simd.h"
#include "kernels/ops/backend.h"
#include "kernels/ops/packed_types.h"

namespace upmoe::cpu {

namespace {

constexpr std::int64_t kBlock = 32768;  // elements of a row that are one task

// move(tensor, its first element, place of that in the packed memory, how many) for neighbours, none twice.
template <class Move>
void for_runs(const PackedParts& packing, std::int64_t stride, std::int64_t except, const Move& move) {
  const std::int64_t blocks = (packing.slice() + kBlock - 1) / kBlock;
  parallel_for(packing.parts() * blocks, std::min(kBlock, packing.slice()), [&](std::int64_t b) {
    const std::int64_t row = b / blocks, from = b % blocks * kBlock, to = from + kBlock;
    if (row == except) return;
    std::int64_t at = 0;  // in the row: where the tensor's part begins
    for (std::size_t i = 0; i < packing.elements().size() && at < to; ++i) {
      const auto [begin, size] = packing.part(i, row);
      const std::int64_t first = std::max(from, at), last = std::min(to, at + size);
      if (first < last) move(i, begin + first - at, row * stride + first, last - first);
      at += size;
    }
  });
}

template <class Out, class In>
void copy(Out* out, const In* in, std::int64_t n) {
  if constexpr (std::same_as<Out, In>) {
    std::memcpy(static_cast<void*>(out), in, static_cast<std::size_t>(n) * sizeof(Out));
  } else {
    for_lanes(n, [&](std::int64_t i, auto lanes) { store(out + i, load(in + i, lanes), lanes); });
  }
}

template <class Out, class In>
void add_onto(Out* out, const In* in, std::int64_t n) {
  for_lanes(n, [&](std::int64_t i, auto lanes) {
    store(out + i, load(out + i, lanes) + load(in + i, lanes), lanes);
  });
}

}  // namespace

void pack_parts(Exec&, TensorView packed_PS, std::span<const ConstTensorView> tensors,
                const PackedParts& packing) {
  ops::with_packed_types(tensors, packed_PS.dtype, [&](auto type, auto packed_type) {
    using T = decltype(type);
    auto* packed = packed_PS.as<decltype(packed_type)>();
    for_runs(packing, packed_PS.shape[1], kNoRow,
             [&](std::size_t tensor, std::int64_t first, std::int64_t place, std::int64_t n) {
               copy(packed + place, tensors[tensor].as<T>() + first, n);
             });
  });
}

void unpack_parts(Exec&, std::span<const TensorView> tensors, ConstTensorView packed_PS,
                  const PackedParts& packing, std::int64_t except, Accumulate mode) {
  ops::with_packed_types(tensors, packed_PS.dtype, [&](auto type, auto packed_type) {
    using T = decltype(type);
    const auto* packed = packed_PS.as<decltype(packed_type)>();
    for_runs(packing, packed_PS.shape[1], except,
             [&](std::size_t tensor, std::int64_t first, std::int64_t place, std::int64_t n) {
               T* out = tensors[tensor].as<T>() + first;
               mode == Accumulate::kAdd ? add_onto(out, packed + place, n) : copy(out, packed + place, n);
             });
  });
}

}  // namespace upmoe::cpu
