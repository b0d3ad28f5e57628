#include "kernels/ops/activation.h"

#include <cmath>

#include "kernels/cpu/parallel_for.h"
#include "kernels/cpu/row_sums.h"
#include "kernels/cpu/simd.h"
#include "kernels/cpu/vector_math.h"
#include "kernels/ops/backend.h"

namespace upmoe::cpu {

namespace {

struct GateUp {
  f32x16 gate, up;
};

//   memory   g0 u0 g1 u1 g2 u2 ... g15 u15   (a run of rows of the one weight is a run of whole neurons)
//   lanes    gate: g0 g1 g2 ... g15    up: u0 u1 u2 ... u15
// Sixteen (gate, up) pairs, taken apart and put together in registers.
GateUp load_pairs(const float* p) {
  const f32x16 a = load(p), b = load(p + kLanes);
  return {__builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
          __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)};
}
void store_pairs(float* p, const GateUp& v) {
  store(p, __builtin_shufflevector(v.gate, v.up, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23));
  store(p + kLanes,
        __builtin_shufflevector(v.gate, v.up, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31));
}

// A pair of bf16 is one 32-bit word: the gate below, the up value above (little endian).
GateUp load_pairs(const bf16* p) {
  u32x16 words;
  std::memcpy(&words, p, sizeof words);
  return {std::bit_cast<f32x16>(words << 16), std::bit_cast<f32x16>(words & 0xffff0000u)};
}
void store_pairs(bf16* p, const GateUp& v) {
  const u32x16 words = bf16_pairs(v.gate, v.up);
  std::memcpy(static_cast<void*>(p), &words, sizeof words);
}

template <class T>
GateUp load_pairs(const T* p, AllLanes) {
  return load_pairs(p);
}
template <class T>
void store_pairs(T* p, const GateUp& v, AllLanes) {
  store_pairs(p, v);
}
template <class T>
GateUp load_pairs(const T* p, FirstLanes lanes) {
  T block[2 * kLanes] = {};
  for (std::int64_t i = 0; i < 2 * lanes.count; ++i) block[i] = p[i];
  return load_pairs(block);
}
template <class T>
void store_pairs(T* p, const GateUp& v, FirstLanes lanes) {
  T block[2 * kLanes];
  store_pairs(block, v);
  for (std::int64_t i = 0; i < 2 * lanes.count; ++i) p[i] = block[i];
}

// Both activations are x sigmoid(z(x)): silu with z = x, and gelu's tanh form with
// z = 2 sqrt(2/pi) (x + 0.044715 x^3), as 1 + tanh(u) = 2 sigmoid(2u). Their slope is s + x s (1 - s) z'(x).
struct Silu {
  static f32x16 z(f32x16 x) { return x; }
  static f32x16 times_slope(f32x16 y, f32x16) { return y; }
};
struct GeluTanh {
  static constexpr float kLinear = 1.5957691216057308f, kCubic = 0.07135481282690823f;
  static f32x16 z(f32x16 x) { return x * (kLinear + kCubic * x * x); }
  static f32x16 times_slope(f32x16 y, f32x16 x) { return y * (kLinear + 3.0f * kCubic * x * x); }
};

template <class Act, class T>
void gated_row(T* h, const T* gate_up, float weight, std::int64_t width) {
  for_lanes(width, [&](std::int64_t f, auto lanes) {
    const GateUp v = load_pairs(gate_up + 2 * f, lanes);
    store(h + f, v.gate * vector_sigmoid(Act::z(v.gate)) * v.up * weight, lanes);
  });
}

// Returns the gradient of the row's weight: sum of dh act(gate) up.
template <class Act, class T>
float gated_row_backward(T* dgate_up, const T* dh, const T* gate_up, float weight, std::int64_t width) {
  return sum_lanes(width, [&](std::int64_t f, auto lanes) {
    const GateUp v = load_pairs(gate_up + 2 * f, lanes);
    const f32x16 dh_f = load(dh + f, lanes), s = vector_sigmoid(Act::z(v.gate)), act = v.gate * s;
    const f32x16 da = dh_f * weight;
    const f32x16 slope = s + Act::times_slope(act * (1.0f - s), v.gate);
    store_pairs(dgate_up + 2 * f, GateUp{da * v.up * slope, da * act}, lanes);
    return dh_f * act * v.up;
  });
}

template <class Act>
void gated_forward(const TensorView& h_RF, const ConstTensorView& gate_up_RG,
                   const ConstTensorView& weight_R) {
  const std::int64_t rows = h_RF.shape[0], width = h_RF.shape[1];
  const float* weight = weight_R.if_given<float>();
  with_float_type(h_RF.dtype, [&](auto type) {
    using T = decltype(type);
    T* h = h_RF.as<T>();
    const T* gate_up = gate_up_RG.as<T>();
    parallel_for(rows, 4 * width, [&](std::int64_t r) {
      gated_row<Act>(h + r * width, gate_up + 2 * r * width, weight != nullptr ? weight[r] : 1.0f, width);
    });
  });
}

template <class Act>
void gated_backward(const TensorView& dgate_up_RG, const TensorView& dweight_R, const ConstTensorView& dh_RF,
                    const ConstTensorView& gate_up_RG, const ConstTensorView& weight_R) {
  const std::int64_t rows = dh_RF.shape[0], width = dh_RF.shape[1];
  const float* weight = weight_R.if_given<float>();
  float* dweight = dweight_R.if_given<float>();
  with_float_type(dh_RF.dtype, [&](auto type) {
    using T = decltype(type);
    T* dgate_up = dgate_up_RG.as<T>();
    const T *dh = dh_RF.as<T>(), *gate_up = gate_up_RG.as<T>();
    parallel_for(rows, 4 * width, [&](std::int64_t r) {
      const float sum =
          gated_row_backward<Act>(dgate_up + 2 * r * width, dh + r * width, gate_up + 2 * r * width,
                                  weight != nullptr ? weight[r] : 1.0f, width);
      if (dweight != nullptr) dweight[r] = sum;
    });
  });
}

template <class X, class DX>
void gate_backward(Exec& ex, const TensorView& dx_TD, const GradientView& dw_1D,
                   const ConstTensorView& dgate_T, const ConstTensorView& gate_T, const ConstTensorView& x_TD,
                   const ConstTensorView& w_1D) {
  const std::int64_t rows = x_TD.shape[0], width = x_TD.shape[1];
  ScratchScope scope(*ex.scratch);
  float* partials =
      ex.scratch->take({row_blocks(rows), width}, DType::kF32, "sigmoid_gate_backward dw").as<float>();
  DX* dx = dx_TD.if_given<DX>();
  const X *x = x_TD.as<X>(), *w = w_1D.as<X>();
  const float *dgate = dgate_T.as<float>(), *gate = gate_T.as<float>();
  // dw is a sum over all rows: a partial one for each block of rows, then the blocks in order. dx is of one row alone.
  for_row_blocks(partials, rows, width, [&](std::int64_t first, std::int64_t last, float* dw) {
    for (std::int64_t t = first; t < last; ++t) {
      const float dlogit = dgate[t] * gate[t] * (1.0f - gate[t]);
      const std::int64_t row = t * width;
      for_lanes(width, [&](std::int64_t i, auto lanes) {
        store(dw + i, load(dw + i, lanes) + dlogit * load(x + row + i, lanes), lanes);
        if (dx != nullptr)
          store(dx + row + i, load(dx + row + i, lanes) + dlogit * load(w + i, lanes), lanes);
      });
    }
  });
  add_row_blocks(dw_1D, partials, row_blocks(rows));
}

}  // namespace

void swiglu_forward(Exec&, TensorView h_RF, ConstTensorView gate_up_RG, ConstTensorView weight_R) {
  gated_forward<Silu>(h_RF, gate_up_RG, weight_R);
}

void swiglu_backward(Exec&, TensorView dgate_up_RG, TensorView dweight_R, ConstTensorView dh_RF,
                     ConstTensorView gate_up_RG, ConstTensorView weight_R) {
  gated_backward<Silu>(dgate_up_RG, dweight_R, dh_RF, gate_up_RG, weight_R);
}

void geglu_forward(Exec&, TensorView h_RF, ConstTensorView gate_up_RG, ConstTensorView weight_R) {
  gated_forward<GeluTanh>(h_RF, gate_up_RG, weight_R);
}

void geglu_backward(Exec&, TensorView dgate_up_RG, TensorView dweight_R, ConstTensorView dh_RF,
                    ConstTensorView gate_up_RG, ConstTensorView weight_R) {
  gated_backward<GeluTanh>(dgate_up_RG, dweight_R, dh_RF, gate_up_RG, weight_R);
}

void sigmoid_gate_forward(Exec&, TensorView gate_T, ConstTensorView x_TD, ConstTensorView w_1D) {
  const std::int64_t rows = x_TD.shape[0], width = x_TD.shape[1];
  float* gate = gate_T.as<float>();
  with_float_type(x_TD.dtype, [&](auto type) {
    using T = decltype(type);
    const T *x = x_TD.as<T>(), *w = w_1D.as<T>();
    parallel_for(rows, width, [&](std::int64_t t) {
      const float logit = sum_lanes(width, [&](std::int64_t i, auto lanes) {
        return load(x + t * width + i, lanes) * load(w + i, lanes);
      });
      gate[t] = 1.0f / (1.0f + std::exp(-logit));
    });
  });
}

void sigmoid_gate_backward(Exec& ex, TensorView dx_TD, GradientView dw_1D, ConstTensorView dgate_T,
                           ConstTensorView gate_T, ConstTensorView x_TD, ConstTensorView w_1D) {
  with_float_type(x_TD.dtype, [&](auto x_type) {
    with_float_type(dx_TD.dtype, [&](auto dx_type) {
      gate_backward<decltype(x_type), decltype(dx_type)>(ex, dx_TD, dw_1D, dgate_T, gate_T, x_TD, w_1D);
    });
  });
}

}  // namespace upmoe::cpu
