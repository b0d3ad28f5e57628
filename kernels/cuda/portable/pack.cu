#include "kernels/ops/pack.h"

#include <concepts>
#include <type_traits>

#include "kernels/core/balanced.h"
#include "kernels/cuda/runtime/launch.cuh"
#include "kernels/ops/backend.h"
#include "kernels/ops/packed_types.h"

namespace upmoe::cuda {

namespace {

constexpr std::int64_t kChunk = 8192;  // elements of a row that are a block's

// The tensors, T or const T; a launch takes the table by value, so none has to be kept on the device.
template <class T>
struct PackedTensors {
  T* data[PackedParts::kMostTensors] = {};
  std::int64_t elements[PackedParts::kMostTensors] = {};
  int count = 0;
  std::int64_t parts = 1, stride = 0, except = kNoRow;  // stride: of the packed memory's rows
  unsigned chunks = 0;                                  // of a row
};

template <int N, bool kAdd, class Out, class In>
__device__ void move_pack(Out* out, const In* in) {
  if constexpr (!kAdd && std::same_as<Out, In>) {
    *reinterpret_cast<Pack<Out, N>*>(out) = *reinterpret_cast<const Pack<In, N>*>(in);
  } else {
    float v[N];
    load_floats(v, in);
    if constexpr (kAdd) {
      float sum[N];
      load_floats(sum, static_cast<const Out*>(out));
#pragma unroll
      for (int j = 0; j < N; ++j) v[j] = sum[j] + v[j];
    }
    store_floats(out, v);
  }
}

// Elements from x on until one lies at a multiple of N.
template <int N, class T>
__device__ int until_aligned(const T* x) {
  return (N - static_cast<int>(reinterpret_cast<std::uintptr_t>(x) / sizeof(T) % N)) % N;
}

// n neighbours, by all threads of a block: in packs of at most 16 bytes behind the first and before the last few, where
// both sides reach a multiple of a pack together.
template <bool kAdd, class Out, class In>
__device__ void move_run(Out* __restrict__ out, const In* __restrict__ in, int n) {
  constexpr int N = sizeof(Out) > sizeof(In) ? kPack<Out> : kPack<In>;
  const int thread = static_cast<int>(threadIdx.x), aligned = until_aligned<N>(out);
  const int head = aligned == until_aligned<N>(in) && aligned < n ? aligned : n, whole = (n - head) / N;
#pragma unroll 4
  for (int i = thread; i < head; i += kThreads) move_pack<1, kAdd>(out + i, in + i);
#pragma unroll 4
  for (int i = thread; i < whole; i += kThreads) move_pack<N, kAdd>(out + head + i * N, in + head + i * N);
  for (int i = head + whole * N + thread; i < n; i += kThreads) move_pack<1, kAdd>(out + i, in + i);
}

// move(packed memory from an element on, a tensor from an element on, how many) for the runs of this block's chunk.
template <class T, class Move>
__device__ void for_runs(const PackedTensors<T>& tensors, const Move& move) {
  __shared__ std::int64_t begin[PackedParts::kMostTensors], size[PackedParts::kMostTensors];
  const std::int64_t row = blockIdx.x / tensors.chunks;
  if (row == tensors.except) return;
  if (const int i = static_cast<int>(threadIdx.x); i < tensors.count) {
    begin[i] = balanced_begin(tensors.elements[i], tensors.parts, row);
    size[i] = balanced_begin(tensors.elements[i], tensors.parts, row + 1) - begin[i];
  }
  __syncthreads();
  const std::int64_t from = blockIdx.x % tensors.chunks * kChunk, to = from + kChunk;
  std::int64_t at = 0;  // in the row: where the tensor's part begins
  for (int i = 0; i < tensors.count && at < to; ++i) {
    const std::int64_t end = at + size[i], first = from < at ? at : from, last = to < end ? to : end;
    if (first < last)
      move(row * tensors.stride + first, tensors.data[i] + begin[i] + (first - at),
           static_cast<int>(last - first));
    at = end;
  }
}

template <class T, class P>
__global__ void pack_chunks(P* packed, const __grid_constant__ PackedTensors<const T> tensors) {
  for_runs(tensors, [&](std::int64_t place, const T* in, int n) { move_run<false>(packed + place, in, n); });
}

template <bool kAdd, class T, class P>
__global__ void unpack_chunks(const P* packed, const __grid_constant__ PackedTensors<T> tensors) {
  for_runs(tensors, [&](std::int64_t place, T* out, int n) { move_run<kAdd>(out, packed + place, n); });
}

template <class T, class View>
PackedTensors<T> table_of(std::span<const View> tensors, const PackedParts& packing,
                          const ConstTensorView& packed_PS, std::int64_t except) {
  static_assert(PackedParts::kMostTensors <= kThreads);
  PackedTensors<T> table;
  for (const View& t : tensors) {
    table.data[table.count] = t.template as<std::remove_const_t<T>>();
    table.elements[table.count++] = t.elements();
  }
  table.parts = packing.parts();
  table.stride = packed_PS.shape[1];
  table.except = except;
  table.chunks = blocks_for(packing.slice(), kChunk);
  return table;
}

template <class T>
unsigned blocks_of(const PackedTensors<T>& table) {
  return blocks_for(table.parts * table.chunks, 1);
}

}  // namespace

void pack_parts(Exec& ex, TensorView packed_PS, std::span<const ConstTensorView> tensors,
                const PackedParts& packing) {
  ops::with_packed_types(tensors, packed_PS.dtype, [&](auto type, auto packed_type) {
    using T = decltype(type);
    using P = decltype(packed_type);
    const auto table = table_of<const T>(tensors, packing, packed_PS, kNoRow);
    launch(ex, blocks_of(table), kThreads, pack_chunks<T, P>, packed_PS.as<P>(), table);
  });
}

void unpack_parts(Exec& ex, std::span<const TensorView> tensors, ConstTensorView packed_PS,
                  const PackedParts& packing, std::int64_t except, Accumulate mode) {
  ops::with_packed_types(tensors, packed_PS.dtype, [&](auto type, auto packed_type) {
    using T = decltype(type);
    using P = decltype(packed_type);
    const auto table = table_of<T>(tensors, packing, packed_PS, except);
    const auto kernel = mode == Accumulate::kAdd ? unpack_chunks<true, T, P> : unpack_chunks<false, T, P>;
    launch(ex, blocks_of(table), kThreads, kernel, packed_PS.as<P>(), table);
  });
}

}  // namespace upmoe::cuda
