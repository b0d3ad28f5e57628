// Sums of several ranks' slices in rank order: what makes a result independent of who carried it.

#include <type_traits>

#include "kernels/core/gpu.h"
#include "kernels/cuda/runtime/launch.cuh"

namespace upmoe::cuda {

namespace {

struct Slices {
  const std::byte *staged, *own;
  int rank, ranks;
  std::int64_t elements;
};

template <class Wide, class T>
__device__ Wide widen(T v) {
  if constexpr (std::is_same_v<T, bf16>) {
    return to_float(v);
  } else {
    return v;
  }
}

template <class T, class Wide>
__device__ T narrow(Wide v) {
  if constexpr (std::is_same_v<T, bf16>) {
    return from_float<bf16>(v);
  } else {
    return static_cast<T>(v);
  }
}

template <ReduceOp op, class Wide>
__device__ Wide combine(Wide a, Wide b) {
  if constexpr (op == ReduceOp::kSum) return a + b;
  if constexpr (op == ReduceOp::kMax) return a < b ? b : a;
  if constexpr (op == ReduceOp::kMin) return b < a ? b : a;
}

// Where rank r's slice of the same elements lies:
//
//   staged   | rank 0 | rank 1 | (a gap) | rank 3 | ...    what the others sent, by rank
//   own                          rank 2                    stays where it is and is never copied
//
// The sum goes through them by rank on whichever rank it is made, so every rank makes the same bits.
// One thread sums N elements that lie together. `own` may be `out`: a thread has read what it writes over.
template <class T, class Wide, ReduceOp op, int N>
__global__ void fold_kernel(T* out, Slices s) {
  const std::int64_t i = global_thread() * N;
  if (i >= s.elements) return;
  const auto part_of = [&](int r) {
    const T* slice = r == s.rank ? reinterpret_cast<const T*>(s.own)
                                 : reinterpret_cast<const T*>(s.staged) + r * s.elements;
    return *reinterpret_cast<const Pack<T, N>*>(slice + i);
  };
  const Pack<T, N> first = part_of(0);
  Wide sum[N];
#pragma unroll
  for (int j = 0; j < N; ++j) sum[j] = widen<Wide>(first.at[j]);
  for (int r = 1; r < s.ranks; ++r) {
    const Pack<T, N> part = part_of(r);
#pragma unroll
    for (int j = 0; j < N; ++j) sum[j] = combine<op>(sum[j], widen<Wide>(part.at[j]));
  }
  Pack<T, N> result;
#pragma unroll
  for (int j = 0; j < N; ++j) result.at[j] = narrow<T>(sum[j]);
  *reinterpret_cast<Pack<T, N>*>(out + i) = result;
}

template <class T, class Wide, ReduceOp op>
void fold_typed(const Exec& ex, std::byte* memory, const Slices& s) {
  T* out = reinterpret_cast<T*>(memory);
  constexpr int kWide = kPack<T>;
  if (packs<kWide>(s.elements, out, reinterpret_cast<const T*>(s.own), reinterpret_cast<const T*>(s.staged)))
    launch(ex, blocks_for(s.elements, kThreads * kWide), kThreads, fold_kernel<T, Wide, op, kWide>, out, s);
  else
    launch(ex, blocks_for(s.elements, kThreads), kThreads, fold_kernel<T, Wide, op, 1>, out, s);
}

template <class T, class Wide>
void fold_by(const Exec& ex, ReduceOp op, std::byte* out, const Slices& s) {
  switch (op) {
    case ReduceOp::kSum:
      return fold_typed<T, Wide, ReduceOp::kSum>(ex, out, s);
    case ReduceOp::kMax:
      return fold_typed<T, Wide, ReduceOp::kMax>(ex, out, s);
    case ReduceOp::kMin:
      return fold_typed<T, Wide, ReduceOp::kMin>(ex, out, s);
  }
}

}  // namespace

}  // namespace upmoe::cuda

namespace upmoe::gpu {

void fold_slices(Stream& stream, ReduceOp op, DType dtype, std::byte* out, const std::byte* staged,
                 const std::byte* own, int rank, int ranks, std::int64_t elements) {
  Exec ex;
  ex.stream = &stream;
  const cuda::Slices slices{staged, own, rank, ranks, elements};
  switch (dtype) {
    case DType::kF32:
      // fp32 is summed in fp64 and bf16 in fp32, rounded once at the end: the error does not grow with the ranks.
      return cuda::fold_by<float, double>(ex, op, out, slices);
    case DType::kBF16:
      return cuda::fold_by<bf16, float>(ex, op, out, slices);
    case DType::kF64:
      return cuda::fold_by<double, double>(ex, op, out, slices);
    case DType::kI32:
      return cuda::fold_by<std::int32_t, std::int32_t>(ex, op, out, slices);
    case DType::kI64:
      return cuda::fold_by<std::int64_t, std::int64_t>(ex, op, out, slices);
    case DType::kU8:
      UPMOE_CHECK(false, "bytes are moved, not summed");
  }
}

}  // namespace upmoe::gpu
