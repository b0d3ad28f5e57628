#include "kernels/ops/pointwise.h"

#include "kernels/cuda/runtime/launch.cuh"
#include "kernels/ops/backend.h"

namespace upmoe::cuda {

namespace {

// f.run<N>(i) works on the N elements from i on: packs of N while they last, then single ones.
template <int N, class F>
__global__ void for_elements(F f, std::int64_t n) {
  const std::int64_t i = global_thread() * N;
  if (i + N <= n) {
    f.template run<N>(i);
  } else {
    for (std::int64_t j = i; j < n; ++j) f.template run<1>(j);
  }
}

template <int N, class F>
void launch_elements(const Exec& ex, const F& f, std::int64_t n) {
  launch(ex, blocks_for(n, std::int64_t{kThreads} * N), kThreads, for_elements<N, F>, f, n);
}

// In packs where the addresses allow it.
template <int N, class F, class... T>
void for_aligned(const Exec& ex, const F& f, std::int64_t n, const T*... addresses) {
  if (packs<N>(N, addresses...)) return launch_elements<N>(ex, f, n);
  launch_elements<1>(ex, f, n);
}

template <class T>
struct Fill {
  T* x;
  float value;
  template <int N>
  __device__ void run(std::int64_t i) const {
    float v[N];
#pragma unroll
    for (int j = 0; j < N; ++j) v[j] = value;
    store_floats(x + i, v);
  }
};

template <class Out, class In>
struct Cast {
  Out* out;
  const In* in;
  template <int N>
  __device__ void run(std::int64_t i) const {
    float v[N];
    load_floats(v, in + i);
    store_floats(out + i, v);
  }
};

template <class T>
struct Add {
  T* out;
  const T *a, *b;
  template <int N>
  __device__ void run(std::int64_t i) const {
    float left[N], right[N];
    load_floats(left, a + i);
    load_floats(right, b + i);
#pragma unroll
    for (int j = 0; j < N; ++j) left[j] += right[j];
    store_floats(out + i, left);
  }
};

template <class T>
struct Clip {
  T* out;
  const T* in;
  float limit;
  template <int N>
  __device__ void run(std::int64_t i) const {
    float v[N];
    load_floats(v, in + i);
#pragma unroll
    for (int j = 0; j < N; ++j) v[j] = v[j] > limit ? limit : v[j] < -limit ? -limit : v[j];
    store_floats(out + i, v);
  }
};

template <class T>
struct ClipBackward {
  T* dx;
  const T* in;
  float limit;
  template <int N>
  __device__ void run(std::int64_t i) const {
    float g[N], v[N];
    load_floats(g, dx + i);
    load_floats(v, in + i);
#pragma unroll
    for (int j = 0; j < N; ++j) g[j] = v[j] > limit || v[j] < -limit ? 0.0f : g[j];
    store_floats(dx + i, g);
  }
};

template <class T>
struct Scale {
  T* x;
  float factor;
  template <int N>
  __device__ void run(std::int64_t i) const {
    float v[N];
    load_floats(v, x + i);
#pragma unroll
    for (int j = 0; j < N; ++j) v[j] *= factor;
    store_floats(x + i, v);
  }
};

template <class Out, class In>
struct CopyColumns {
  Out* out;
  const In* in;
  std::int64_t out_width, in_width, width;
  template <int N>  // columns of one row: the launch sees to it that N divides the width
  __device__ void run(std::int64_t i) const {
    const std::int64_t t = i / width, c = i % width;
    float v[N];
    load_floats(v, in + t * in_width + c);
    store_floats(out + t * out_width + c, v);
  }
};

// The same sum on every GPU, whatever the number of its multiprocessors:
//
//   x         | block 0: kSumBlock elements | block 1 | ...      one partial each, in fp64
//   partial   |  0  |  1  | ...                                  of all the tensors of a call, one behind the other
//   sum_1     one block adds them up, and to what is there
//
// Elements whose sum is one partial; the order of a sum depends on this, on kThreads and on the dtype alone,
// not on where the elements lie.
constexpr std::int64_t kSumBlock = 65536;

template <bool kSquare, int N, class T>
__device__ void add_pack(double& sum, const T (&x)[N]) {
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const double d = to_float(x[j]);
    sum += kSquare ? d * d : d;
  }
}

// A thread's part of a block that has all its elements. Nothing is asked on the way, so that several packs of 16 bytes
// are under way for each thread: with one alone the memory would wait for the sums.
template <bool kSquare, class T>
__device__ double sum_whole(const T* x) {
  constexpr int N = kPack<T>, kAtOnce = 8, kStride = kThreads * N;
  static_assert(kSumBlock % (kAtOnce * kStride) == 0);
  double sum = 0;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x) * N; i < kSumBlock; i += kAtOnce * kStride) {
    Pack<T, N> packs[kAtOnce];
#pragma unroll
    for (int p = 0; p < kAtOnce; ++p) packs[p] = *reinterpret_cast<const Pack<T, N>*>(x + i + p * kStride);
#pragma unroll
    for (int p = 0; p < kAtOnce; ++p) add_pack<kSquare>(sum, packs[p].at);
  }
  return sum;
}
// Of one that is cut, or whose packs do not lie at multiples of their size: the same elements in the same order.
template <bool kSquare, class T>
__device__ double sum_part(const T* x, std::int64_t n) {
  constexpr int N = kPack<T>;
  double sum = 0;
  for (std::int64_t i = threadIdx.x * N; i < n; i += kThreads * N) {
    T pack[N] = {};
#pragma unroll
    for (int j = 0; j < N; ++j)
      if (i + j < n) pack[j] = x[i + j];
    add_pack<kSquare>(sum, pack);
  }
  return sum;
}

constexpr int kSummed = 64;  // tensors of a launch, at most

// Tensors of one type; a launch takes the table by value.
template <class T>
struct SummedTensors {
  const T* data[kSummed] = {};
  std::int64_t elements[kSummed] = {};
  std::int64_t partial[kSummed] = {};  // where its sums begin
  unsigned block[kSummed] = {};        // its first one of the launch
  int count = 0;
  unsigned blocks = 0;
};

template <bool kSquare, class T>
__global__ void partial_sums(double* partial, const __grid_constant__ SummedTensors<T> tensors) {
  __shared__ double memory[kThreads / kWarp];
  int t = 0;  // whose block this is: the last tensor that begins at it or before
#pragma unroll
  for (int step = kSummed / 2; step > 0; step /= 2)
    if (t + step < tensors.count && tensors.block[t + step] <= blockIdx.x) t += step;
  const std::int64_t block = blockIdx.x - tensors.block[t], rest = tensors.elements[t] - block * kSumBlock;
  const T* x = tensors.data[t] + block * kSumBlock;
  const bool whole =
      rest >= kSumBlock && reinterpret_cast<std::uintptr_t>(x) % sizeof(Pack<T, kPack<T>>) == 0;
  double sum = whole ? sum_whole<kSquare>(x) : sum_part<kSquare>(x, rest < kSumBlock ? rest : kSumBlock);
  sum = block_sum(sum, memory);
  if (threadIdx.x == 0) partial[tensors.partial[t] + block] = sum;
}

__global__ void add_partials(double* sum_1, const double* partial, std::int64_t count) {
  __shared__ double memory[kThreads / kWarp];
  double sum = 0;
  for (std::int64_t i = threadIdx.x; i < count; i += kThreads) sum += partial[i];
  sum = block_sum(sum, memory);
  if (threadIdx.x == 0) *sum_1 += sum;
}

// The partial sums of those of the tensors that are of one type, as many in a launch as it takes.
template <bool kSquare, class T>
void launch_partial_sums(const Exec& ex, double* partial, std::span<const ConstTensorView> parts) {
  SummedTensors<T> tensors;
  const auto flush = [&] {
    launch(ex, tensors.blocks, kThreads, partial_sums<kSquare, T>, partial, tensors);
    tensors = {};
  };
  std::int64_t first = 0;
  for (const ConstTensorView& x : parts) {
    const unsigned own = blocks_for(x.elements(), kSumBlock);
    if (x.dtype == DTypeOf<T>::value && own > 0) {
      if (tensors.count == kSummed) flush();
      tensors.data[tensors.count] = x.as<T>();
      tensors.elements[tensors.count] = x.elements();
      tensors.partial[tensors.count] = first;
      tensors.block[tensors.count++] = tensors.blocks;
      tensors.blocks += own;
    }
    first += own;
  }
  flush();
}

template <bool kSquare>
void ordered_sum(const Exec& ex, const TensorView& sum_1, std::span<const ConstTensorView> parts) {
  std::int64_t blocks = 0;
  for (const ConstTensorView& x : parts) blocks += blocks_for(x.elements(), kSumBlock);
  ScratchScope scope(*ex.scratch);
  auto* partial = ex.scratch->take({blocks}, DType::kF64, "partial sums").as<double>();
  launch_partial_sums<kSquare, float>(ex, partial, parts);
  if constexpr (kSquare) launch_partial_sums<kSquare, bf16>(ex, partial, parts);
  launch(ex, 1, kThreads, add_partials, sum_1.as<double>(), partial, blocks);
}

}  // namespace

void fill(Exec& ex, TensorView x, float value) {
  with_float_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    for_aligned<kPack<T>>(ex, Fill<T>{x.as<T>(), value}, x.elements(), x.as<T>());
  });
}

void cast(Exec& ex, TensorView out, ConstTensorView in) {
  if (out.dtype == in.dtype) {
    if (out.data != in.data && in.bytes() > 0)
      check(cudaMemcpyAsync(out.data, in.data, in.bytes(), cudaMemcpyDefault, stream_of(ex).raw()));
    return;
  }
  with_float_type(in.dtype, [&](auto in_type) {
    with_float_type(out.dtype, [&](auto out_type) {
      using In = decltype(in_type);
      using Out = decltype(out_type);
      for_aligned<4>(ex, Cast<Out, In>{out.as<Out>(), in.as<In>()}, in.elements(), out.as<Out>(),
                     in.as<In>());
    });
  });
}

void copy_columns(Exec& ex, TensorView out_TM, std::int64_t out_begin, ConstTensorView in_TN,
                  std::int64_t in_begin, std::int64_t width) {
  with_float_type(out_TM.dtype, [&](auto out_type) {
    with_float_type(in_TN.dtype, [&](auto in_type) {
      using Out = decltype(out_type);
      using In = decltype(in_type);
      const CopyColumns<Out, In> copy{out_TM.as<Out>() + out_begin, in_TN.as<In>() + in_begin,
                                      out_TM.shape[1], in_TN.shape[1], width};
      const std::int64_t n = out_TM.shape[0] * width;
      // A pack must lie wholly in a row of each tensor, and begin at a multiple of its size in every one of them.
      const bool whole_packs = out_TM.shape[1] % 4 == 0 && in_TN.shape[1] % 4 == 0;
      if (whole_packs && packs<4>(width, copy.out, copy.in)) return launch_elements<4>(ex, copy, n);
      launch_elements<1>(ex, copy, n);
    });
  });
}

void add(Exec& ex, TensorView out, ConstTensorView a, ConstTensorView b) {
  with_float_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    const Add<T> sum{out.as<T>(), a.as<T>(), b.as<T>()};
    for_aligned<kPack<T>>(ex, sum, a.elements(), sum.out, sum.a, sum.b);
  });
}

void scale(Exec& ex, TensorView x, float factor) {
  with_float_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    for_aligned<kPack<T>>(ex, Scale<T>{x.as<T>(), factor}, x.elements(), x.as<T>());
  });
}

void clip(Exec& ex, TensorView out, ConstTensorView in, float limit) {
  with_float_type(in.dtype, [&](auto type) {
    using T = decltype(type);
    const Clip<T> held{out.as<T>(), in.as<T>(), limit};
    for_aligned<kPack<T>>(ex, held, in.elements(), held.out, held.in);
  });
}

void clip_backward(Exec& ex, TensorView dx, ConstTensorView in, float limit) {
  with_float_type(dx.dtype, [&](auto type) {
    using T = decltype(type);
    const ClipBackward<T> masked{dx.as<T>(), in.as<T>(), limit};
    for_aligned<kPack<T>>(ex, masked, dx.elements(), masked.dx, masked.in);
  });
}

void sum_of_squares(Exec& ex, TensorView sum_1, std::span<const ConstTensorView> parts) {
  ordered_sum<true>(ex, sum_1, parts);
}

void sum(Exec& ex, TensorView sum_1, ConstTensorView x) {
  ordered_sum<false>(ex, sum_1, std::span(&x, 1));
}

}  // namespace upmoe::cuda
