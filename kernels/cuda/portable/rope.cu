#include "kernels/cuda/runtime/launch.cuh"
#include "kernels/ops/attention.h"
#include "kernels/ops/backend.h"

namespace upmoe::cuda {

namespace {

constexpr int kMostPairs = 128;  // of a head: head_dim up to 256

// By value in the launch: the host takes them as the CPU does, and there is nothing to copy.
struct Frequencies {
  float at[kMostPairs];
};

// A head's pairs are i and i + half, not neighbours:
//
//   head    | a0 a1 ... | b0 b1 ... |      (a, b) turns by the angle of pair i: (a cos - b sin, b cos + a sin)
//             half        half             the inverse turns back: sign -1 on the sine
//
// The sines of a token are the same in all its heads and are computed once, into shared memory. Keys follow the queries
// in qkv, so heads + kv_heads heads are turned, and the values behind them are not.
//
// One block, one token. The angle is rounded to fp32, as transformers does; its sine and cosine are taken in
// fp64, because an angle may have lost its fraction to a reduction in fp32.
template <int N, class T>
__global__ void rotate(T* qkv, const std::int32_t* positions, Frequencies frequency, std::int64_t width,
                       int heads, int half, float sign) {
  __shared__ float cosine[kMostPairs], sine[kMostPairs];
  const std::int64_t t = blockIdx.x;
  for (int i = static_cast<int>(threadIdx.x); i < half; i += kThreads) {
    const float angle = static_cast<float>(positions[t]) * frequency.at[i];
    cosine[i] = to_float(from_float<T>(static_cast<float>(cos(static_cast<double>(angle)))));
    sine[i] = to_float(from_float<T>(static_cast<float>(sin(static_cast<double>(angle))))) * sign;
  }
  __syncthreads();
  const int packs_of_half = half / N;
  for (int at = static_cast<int>(threadIdx.x); at < heads * packs_of_half; at += kThreads) {
    const int head = at / packs_of_half, i = at % packs_of_half * N;
    T* x = qkv + t * width + static_cast<std::int64_t>(head) * 2 * half + i;
    float a[N], b[N];
    load_floats(a, x);
    load_floats(b, x + half);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float c = cosine[i + j], s = sine[i + j], left = a[j];
      a[j] = left * c - b[j] * s;
      b[j] = b[j] * c + left * s;
    }
    store_floats(x, a);
    store_floats(x + half, b);
  }
}

}  // namespace

void rope(Exec& ex, TensorView qkv_TH, ConstTensorView positions_T, AttentionShape shape, double theta,
          bool inverse) {
  const int half = static_cast<int>(shape.head_dim / 2);
  UPMOE_CHECK(half <= kMostPairs, "head_dim {}, at most {} on a GPU", shape.head_dim, 2 * kMostPairs);
  Frequencies frequency{};
  for (int i = 0; i < half; ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(shape.head_dim);
    frequency.at[i] = 1.0f / std::pow(static_cast<float>(theta), exponent);
  }
  with_float_type(qkv_TH.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int N = kPack<T>;
    const bool wide = half % N == 0 && packs<N>(shape.qkv_width(), qkv_TH.as<T>());
    launch(ex, static_cast<unsigned>(qkv_TH.shape[0]), kThreads, wide ? rotate<N, T> : rotate<1, T>,
           qkv_TH.as<T>(), positions_T.as<std::int32_t>(), frequency, shape.qkv_width(),
           static_cast<int>(shape.heads + shape.kv_heads), half, inverse ? -1.0f : 1.0f);
  });
}

}  // namespace upmoe::cuda
