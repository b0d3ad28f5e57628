#include "kernels/ops/pointwise.h"

#include <algorithm>
#include <cstring>

#include "kernels/cpu/parallel_for.h"
#include "kernels/cpu/simd.h"
#include "kernels/ops/backend.h"

namespace upmoe::cpu {

namespace {

// Elements of one task, and of one partial sum: the order of a sum depends on this alone.
constexpr std::int64_t kBlock = 8192;

std::int64_t blocks_of(std::int64_t n) {
  return (n + kBlock - 1) / kBlock;
}

// body(begin, count) for each block of n elements.
template <class Body>
void for_blocks(std::int64_t n, Body&& body) {
  parallel_for(blocks_of(n), kBlock,
               [&](std::int64_t b) { body(b * kBlock, std::min(kBlock, n - b * kBlock)); });
}

using f64x8 = double __attribute__((vector_size(64)));

f64x8 to_double(const float* x) {
  float __attribute__((vector_size(32))) narrow;
  std::memcpy(&narrow, x, sizeof narrow);
  return __builtin_convertvector(narrow, f64x8);
}

// sum over i < count of term(x[i]) in fp64: sixteen running sums, then one after the other.
template <class T, class Term>
double sum_block(const T* x, std::int64_t count, const Term& term) {
  f64x8 low{}, high{};
  for_lanes(count, [&](std::int64_t i, auto lanes) {
    float values[kLanes];  // lanes past the end are zero and add nothing
    store(values, load(x + i, lanes));
    low += term(to_double(values));
    high += term(to_double(values + kLanes / 2));
  });
  const f64x8 both = low + high;
  double total = 0;
  for (int i = 0; i < 8; ++i) total += both[i];
  return total;
}

template <class Term>
void ordered_sum(Exec& ex, const TensorView& sum_1, const ConstTensorView& x, const Term& term) {
  const std::int64_t n = x.elements();
  ScratchScope scope(*ex.scratch);
  auto* partial = ex.scratch->take({blocks_of(n)}, DType::kF64, "partial sums").as<double>();
  with_float_type(x.dtype, [&](auto type) {
    const auto* values = x.as<decltype(type)>();
    for_blocks(n, [&](std::int64_t begin, std::int64_t count) {
      partial[begin / kBlock] = sum_block(values + begin, count, term);
    });
  });
  double total = *sum_1.as<double>();
  for (std::int64_t b = 0; b < blocks_of(n); ++b) total += partial[b];
  *sum_1.as<double>() = total;
}

}  // namespace

void fill(Exec&, TensorView x, float value) {
  with_float_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    T* out = x.as<T>();
    const T rounded = from_float<T>(value);
    for_blocks(x.elements(),
               [&](std::int64_t begin, std::int64_t count) { std::fill_n(out + begin, count, rounded); });
  });
}

void cast(Exec&, TensorView out, ConstTensorView in) {
  const std::int64_t n = in.elements();
  if (out.dtype == in.dtype) {
    if (out.data == in.data) return;
    const std::size_t size = size_of(in.dtype);
    return for_blocks(n, [&](std::int64_t begin, std::int64_t count) {
      const std::size_t at = static_cast<std::size_t>(begin) * size;
      std::memcpy(out.data + at, in.data + at, static_cast<std::size_t>(count) * size);
    });
  }
  with_float_type(in.dtype, [&](auto in_type) {
    with_float_type(out.dtype, [&](auto out_type) {
      const auto* from = in.as<decltype(in_type)>();
      auto* to = out.as<decltype(out_type)>();
      for_blocks(n, [&](std::int64_t begin, std::int64_t count) {
        for_lanes(count, [&](std::int64_t i, auto lanes) {
          store(to + begin + i, load(from + begin + i, lanes), lanes);
        });
      });
    });
  });
}

void copy_columns(Exec&, TensorView out_TM, std::int64_t out_begin, ConstTensorView in_TN,
                  std::int64_t in_begin, std::int64_t width) {
  with_float_type(out_TM.dtype, [&](auto out_type) {
    with_float_type(in_TN.dtype, [&](auto in_type) {
      auto* out = out_TM.as<decltype(out_type)>() + out_begin;
      const auto* in = in_TN.as<decltype(in_type)>() + in_begin;
      parallel_for(out_TM.shape[0], width, [&](std::int64_t t) {
        for_lanes(width, [&](std::int64_t i, auto lanes) {
          store(out + t * out_TM.shape[1] + i, load(in + t * in_TN.shape[1] + i, lanes), lanes);
        });
      });
    });
  });
}

void add(Exec&, TensorView out, ConstTensorView a, ConstTensorView b) {
  with_float_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    T* sums = out.as<T>();
    const T *left = a.as<T>(), *right = b.as<T>();
    for_blocks(a.elements(), [&](std::int64_t begin, std::int64_t count) {
      for_lanes(count, [&](std::int64_t i, auto lanes) {
        store(sums + begin + i, load(left + begin + i, lanes) + load(right + begin + i, lanes), lanes);
      });
    });
  });
}

void scale(Exec&, TensorView x, float factor) {
  with_float_type(x.dtype, [&](auto type) {
    auto* values = x.as<decltype(type)>();
    for_blocks(x.elements(), [&](std::int64_t begin, std::int64_t count) {
      for_lanes(count, [&](std::int64_t i, auto lanes) {
        store(values + begin + i, load(values + begin + i, lanes) * factor, lanes);
      });
    });
  });
}

void clip(Exec&, TensorView out, ConstTensorView in, float limit) {
  const f32x16 high = splat(limit), low = splat(-limit);
  with_float_type(in.dtype, [&](auto type) {
    auto* held = out.as<decltype(type)>();
    const auto* values = in.as<decltype(type)>();
    for_blocks(in.elements(), [&](std::int64_t begin, std::int64_t count) {
      for_lanes(count, [&](std::int64_t i, auto lanes) {
        const f32x16 v = load(values + begin + i, lanes);
        const f32x16 below = v > high ? high : v;
        store(held + begin + i, below < low ? low : below, lanes);
      });
    });
  });
}

void clip_backward(Exec&, TensorView dx, ConstTensorView in, float limit) {
  const f32x16 high = splat(limit), low = splat(-limit);
  with_float_type(dx.dtype, [&](auto type) {
    auto* gradients = dx.as<decltype(type)>();
    const auto* values = in.as<decltype(type)>();
    for_blocks(dx.elements(), [&](std::int64_t begin, std::int64_t count) {
      for_lanes(count, [&](std::int64_t i, auto lanes) {
        const f32x16 v = load(values + begin + i, lanes), g = load(gradients + begin + i, lanes);
        const f32x16 inside = v > high ? f32x16{} : g;
        store(gradients + begin + i, v < low ? f32x16{} : inside, lanes);
      });
    });
  });
}

void sum_of_squares(Exec& ex, TensorView sum_1, std::span<const ConstTensorView> parts) {
  for (const ConstTensorView& x : parts) ordered_sum(ex, sum_1, x, [](f64x8 v) { return v * v; });
}

void sum(Exec& ex, TensorView sum_1, ConstTensorView x) {
  ordered_sum(ex, sum_1, x, [](f64x8 v) { return v; });
}

}  // namespace upmoe::cpu
