#include "kernels/ops/activation.h"

#include "kernels/cuda/portable/row_sums.cuh"
#include "kernels/cuda/runtime/launch.cuh"
#include "kernels/ops/backend.h"

namespace upmoe::cuda {

namespace {

// The sigmoid for results of type T: those of bf16 keep 8 bits of it.
template <class T>
__device__ float sigmoid(float x) {
  if constexpr (sizeof(T) == 2) {
    return __fdividef(1.0f, 1.0f + __expf(-x));
  } else {
    return 1.0f / (1.0f + expf(-x));
  }
}

// Both activations are x sigmoid(z(x)): silu with z = x, and gelu's tanh form with
// z = 2 sqrt(2/pi) (x + 0.044715 x^3), as 1 + tanh(u) = 2 sigmoid(2u). Their slope is s + x s (1 - s) z'(x).
struct Silu {
  __device__ static float z(float x) { return x; }
  __device__ static float times_slope(float y, float) { return y; }
};
struct GeluTanh {
  static constexpr float kLinear = 1.5957691216057308f, kCubic = 0.07135481282690823f;
  __device__ static float z(float x) { return x * (kLinear + kCubic * x * x); }
  __device__ static float times_slope(float y, float x) { return y * (kLinear + 3.0f * kCubic * x * x); }
};

// Threads for pieces of `items`, so that few of them have nothing to do: whole warps, at most kMostThreads.
constexpr std::int64_t kMostThreads = 512;
unsigned threads_for(std::int64_t items) {
  if (items == 0) return kWarp;
  const std::int64_t pieces = (items + kMostThreads - 1) / kMostThreads, each = (items + pieces - 1) / pieces;
  return static_cast<unsigned>((each + kWarp - 1) / kWarp * kWarp);
}

// What one thread has:
//
//   gate_up, row r   | g0 u0 g1 u1 ... | (next thread)       2 N values, one load of 16 bytes
//   h, row r         | h0 h1 ...       |                     h = act(gate) up weight[r]
//
// Rows along x, pieces of a row along y; N neurons of a thread are 2 N interleaved values of gate and up.
template <class Act, int N, class T>
__global__ void gated_rows(T* h, const T* gate_up, const float* weight, std::int64_t width) {
  const std::int64_t row = blockIdx.x,
                     f = (static_cast<std::int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * N;
  if (f >= width) return;
  const float factor = weight != nullptr ? weight[row] : 1.0f;
  float in[2 * N], out[N];
  load_floats(in, gate_up + 2 * (row * width + f));
#pragma unroll
  for (int j = 0; j < N; ++j) out[j] = in[2 * j] * sigmoid<T>(Act::z(in[2 * j])) * in[2 * j + 1] * factor;
  store_floats(h + row * width + f, out);
}

// One warp, one row, because the gradient of its weight is a sum over it.
template <class Act, int N, class T>
__global__ void gated_row_backward(T* dgate_up, float* dweight, const T* dh, const T* gate_up,
                                   const float* weight, std::int64_t rows, std::int64_t width) {
  const std::int64_t row = global_thread() / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if (row >= rows) return;
  const float factor = weight != nullptr ? weight[row] : 1.0f;
  // The weight's gradient is the sum of dh act(gate) up, of h without its weight: the forward applied it to h.
  float sum = 0;
#pragma unroll 4
  for (std::int64_t f = lane * N; f < width; f += kWarp * N) {
    float in[2 * N], out[2 * N], d[N];
    load_floats(in, gate_up + 2 * (row * width + f));
    load_floats(d, dh + row * width + f);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float gate = in[2 * j], up = in[2 * j + 1], s = sigmoid<T>(Act::z(gate)), act = gate * s,
                  da = d[j] * factor;
      out[2 * j] = da * up * (s + Act::times_slope(act * (1.0f - s), gate));
      out[2 * j + 1] = da * act;
      sum += d[j] * act * up;
    }
    store_floats(dgate_up + 2 * (row * width + f), out);
  }
  if (dweight == nullptr) return;
  sum = warp_sum(sum);
  if (lane == 0) dweight[row] = sum;
}

// One warp, one token.
template <int N, class T>
__global__ void gate_rows(float* gate, const T* x, const T* w, std::int64_t tokens, std::int64_t width) {
  const std::int64_t t = global_thread() / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if (t >= tokens) return;
  float sum = 0;
  for (std::int64_t i = lane * N; i < width; i += kWarp * N) {
    float a[N], b[N];
    load_floats(a, x + t * width + i);
    load_floats(b, w + i);
#pragma unroll
    for (int j = 0; j < N; ++j) sum += a[j] * b[j];
  }
  sum = warp_sum(sum);
  if (lane == 0) gate[t] = sigmoid<float>(sum);
}

__device__ inline float logit_gradient(const float* dgate, const float* gate, std::int64_t t) {
  return dgate[t] * gate[t] * (1.0f - gate[t]);
}

template <int N, class DX, class X>
__global__ void gate_dx(DX* dx, const float* dgate, const float* gate, const X* w, std::int64_t width) {
  const std::int64_t t = blockIdx.x;
  const float dlogit = logit_gradient(dgate, gate, t);
  for (std::int64_t i = threadIdx.x * N; i < width; i += kThreads * N) {
    float d[N], weight[N];
    load_floats(d, dx + t * width + i);
    load_floats(weight, w + i);
#pragma unroll
    for (int j = 0; j < N; ++j) d[j] += dlogit * weight[j];
    store_floats(dx + t * width + i, d);
  }
}

template <class X>
struct GateWeightGradient {
  const float *dgate, *gate;
  const X* x;
  std::int64_t width;
  template <int N>
  __device__ void at(float (&out)[N], std::int64_t t, std::int64_t c) const {
    load_floats(out, x + t * width + c);
    const float dlogit = logit_gradient(dgate, gate, t);
#pragma unroll
    for (int j = 0; j < N; ++j) out[j] *= dlogit;
  }
};

template <class Act>
void gated_forward(const Exec& ex, const TensorView& h_RF, const ConstTensorView& gate_up_RG,
                   const ConstTensorView& weight_R) {
  const std::int64_t rows = h_RF.shape[0], width = h_RF.shape[1];
  const float* weight = weight_R.if_given<float>();
  with_float_type(h_RF.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int N = kPack<T> / 2;
    const bool wide = packs<N>(width, h_RF.as<T>()) && packs<2 * N>(2 * width, gate_up_RG.as<T>());
    const std::int64_t items = wide ? width / N : width;
    const unsigned threads = threads_for(items);
    launch(ex, dim3(static_cast<unsigned>(rows), blocks_for(items, threads)), threads,
           wide ? gated_rows<Act, N, T> : gated_rows<Act, 1, T>, h_RF.as<T>(), gate_up_RG.as<T>(), weight,
           width);
  });
}

template <class Act>
void gated_backward(const Exec& ex, const TensorView& dgate_up_RG, const TensorView& dweight_R,
                    const ConstTensorView& dh_RF, const ConstTensorView& gate_up_RG,
                    const ConstTensorView& weight_R) {
  const std::int64_t rows = dh_RF.shape[0], width = dh_RF.shape[1];
  const float* weight = weight_R.if_given<float>();
  float* dweight = dweight_R.if_given<float>();
  with_float_type(dh_RF.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int N = kPack<T> / 2;
    const bool wide =
        packs<N>(width, dh_RF.as<T>()) && packs<2 * N>(2 * width, dgate_up_RG.as<T>(), gate_up_RG.as<T>());
    launch(ex, blocks_for(rows, kThreads / kWarp), kThreads,
           wide ? gated_row_backward<Act, N, T> : gated_row_backward<Act, 1, T>, dgate_up_RG.as<T>(), dweight,
           dh_RF.as<T>(), gate_up_RG.as<T>(), weight, rows, width);
  });
}

}  // namespace

void swiglu_forward(Exec& ex, TensorView h_RF, ConstTensorView gate_up_RG, ConstTensorView weight_R) {
  gated_forward<Silu>(ex, h_RF, gate_up_RG, weight_R);
}

void swiglu_backward(Exec& ex, TensorView dgate_up_RG, TensorView dweight_R, ConstTensorView dh_RF,
                     ConstTensorView gate_up_RG, ConstTensorView weight_R) {
  gated_backward<Silu>(ex, dgate_up_RG, dweight_R, dh_RF, gate_up_RG, weight_R);
}

void geglu_forward(Exec& ex, TensorView h_RF, ConstTensorView gate_up_RG, ConstTensorView weight_R) {
  gated_forward<GeluTanh>(ex, h_RF, gate_up_RG, weight_R);
}

void geglu_backward(Exec& ex, TensorView dgate_up_RG, TensorView dweight_R, ConstTensorView dh_RF,
                    ConstTensorView gate_up_RG, ConstTensorView weight_R) {
  gated_backward<GeluTanh>(ex, dgate_up_RG, dweight_R, dh_RF, gate_up_RG, weight_R);
}

void sigmoid_gate_forward(Exec& ex, TensorView gate_T, ConstTensorView x_TD, ConstTensorView w_1D) {
  const std::int64_t tokens = x_TD.shape[0], width = x_TD.shape[1];
  with_float_type(x_TD.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int N = kPack<T>;
    const bool wide = packs<N>(width, x_TD.as<T>(), w_1D.as<T>());
    launch(ex, blocks_for(tokens, kThreads / kWarp), kThreads, wide ? gate_rows<N, T> : gate_rows<1, T>,
           gate_T.as<float>(), x_TD.as<T>(), w_1D.as<T>(), tokens, width);
  });
}

void sigmoid_gate_backward(Exec& ex, TensorView dx_TD, GradientView dw_1D, ConstTensorView dgate_T,
                           ConstTensorView gate_T, ConstTensorView x_TD, ConstTensorView w_1D) {
  const std::int64_t tokens = x_TD.shape[0], width = x_TD.shape[1];
  const float *dgate = dgate_T.as<float>(), *gate = gate_T.as<float>();
  with_float_type(x_TD.dtype, [&](auto x_type) {
    using X = decltype(x_type);
    sum_wide_columns(ex, dw_1D, GateWeightGradient<X>{dgate, gate, x_TD.as<X>(), width}, tokens,
                     x_TD.as<X>());
    if (!dx_TD.given()) return;
    with_float_type(dx_TD.dtype, [&](auto dx_type) {
      using DX = decltype(dx_type);
      const bool wide = packs<4>(width, dx_TD.as<DX>(), w_1D.as<X>());
      launch(ex, static_cast<unsigned>(tokens), kThreads, wide ? gate_dx<4, DX, X> : gate_dx<1, DX, X>,
             dx_TD.as<DX>(), dgate, gate, w_1D.as<X>(), width);
    });
  });
}

}  // namespace upmoe::cuda
