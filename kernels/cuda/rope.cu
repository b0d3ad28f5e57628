#include "kernels/cuda/launch.cuh"
#include "kernels/ops/attention.h"
#include "kernels/ops/backend.h"

namespace upmoe::cuda {

namespace {

constexpr int kMostPairs = 128;  // of a head: head_dim up to 256

// By value in the launch: the host takes them as the CPU does, and there is nothing to copy.
struct Frequencies {
  float at[kMostPairs];
};

// One block, one token. The angle is rounded to fp32, as transformers does; its sine and cosine are taken in
// fp64, because an angle may have lost its fraction to a reduction in fp32.
template <class T>
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
  for (int at = static_cast<int>(threadIdx.x); at < heads * half; at += kThreads) {
    const int head = at / half, i = at % half;
    T* x = qkv + t * width + static_cast<std::int64_t>(head) * 2 * half + i;
    const float a = to_float(x[0]), b = to_float(x[half]);
    x[0] = from_float<T>(a * cosine[i] - b * sine[i]);
    x[half] = from_float<T>(b * cosine[i] + a * sine[i]);
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
    launch(ex, static_cast<unsigned>(qkv_TH.shape[0]), kThreads, rotate<T>, qkv_TH.as<T>(),
           positions_T.as<std::int32_t>(), frequency, shape.qkv_width(),
           static_cast<int>(shape.heads + shape.kv_heads), half, inverse ? -1.0f : 1.0f);
  });
}

}  // namespace upmoe::cuda
