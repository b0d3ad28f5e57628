#pragma once
// Non-owning views of contiguous tensors. Memory belongs to a Buffer or an Arena (memory.h).
//
// Names carry their shape as a suffix: x_TD is [tokens, model width]. Letters used throughout:
//   T tokens of this rank, D model width, E experts, e local experts, K top-k, N = T*K routed rows,
//   R rows at the local experts, F expert width, G = 2F (gate and up, interleaved per neuron), V vocabulary,
//   H heads*head size, S sequence length, B sequences.

#include <algorithm>
#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>
#include <type_traits>
#include <utility>

#include "kernels/core/bf16.h"
#include "kernels/core/check.h"

namespace upmoe {

enum class DType : std::uint8_t { kF32, kBF16, kI32, kI64, kF64, kU8 };
enum class DeviceType : std::uint8_t { kCpu, kCuda, kDry };  // kDry: checks and books, computes nothing
// What an op does to the values already in its output.
enum class Accumulate : std::uint8_t { kOverwrite, kAdd };

struct Device {
  DeviceType type = DeviceType::kCpu;
  int index = 0;
  friend bool operator==(const Device&, const Device&) = default;
};

std::size_t size_of(DType dtype);  // bytes of one element
const char* name_of(DType dtype);  // "fp32", "bf16", "int32", "int64", "fp64", "uint8"

template <class T>
struct DTypeOf;
template <>
struct DTypeOf<float> {
  static constexpr DType value = DType::kF32;
};
template <>
struct DTypeOf<bf16> {
  static constexpr DType value = DType::kBF16;
};
template <>
struct DTypeOf<std::int32_t> {
  static constexpr DType value = DType::kI32;
};
template <>
struct DTypeOf<std::int64_t> {
  static constexpr DType value = DType::kI64;
};
template <>
struct DTypeOf<double> {
  static constexpr DType value = DType::kF64;
};
template <>
struct DTypeOf<std::uint8_t> {
  static constexpr DType value = DType::kU8;
};

struct Shape {  // rank at most 4
  std::array<std::int64_t, 4> dim{};
  int rank = 0;

  Shape() = default;
  Shape(std::initializer_list<std::int64_t> d);
  std::int64_t operator[](int i) const;  // negative counts from the end
  std::int64_t elements() const;         // 1 for rank 0; checked against overflow
  std::string str() const;               // "[60, 1408, 2, 2048]"
  friend bool operator==(const Shape& a, const Shape& b) = default;
};

// Where a tensor may be absent, an absent one is a view without a shape, `TensorView{}`; given() asks. (On the dry
// device no tensor has memory, so memory says nothing.)
struct TensorView {
  std::byte* data = nullptr;
  Shape shape;
  DType dtype = DType::kF32;
  Device device;

  template <class T>
  T* as() const {
    UPMOE_CHECK(dtype == DTypeOf<T>::value, "tensor holds {}", name_of(dtype));
    return reinterpret_cast<T*>(data);
  }
  template <class T>
  T* if_given() const {  // null when it is absent
    return given() ? as<T>() : nullptr;
  }
  bool given() const { return shape.rank != 0; }
  std::int64_t elements() const { return shape.elements(); }
  std::size_t bytes() const { return static_cast<std::size_t>(elements()) * size_of(dtype); }
  std::int64_t rows() const { return shape.rank == 0 ? 1 : shape.dim[0]; }
  TensorView rows(std::int64_t begin, std::int64_t end) const;  // of the first dim
  TensorView reshape(Shape s) const;                            // same element count, or throws
};

struct ConstTensorView {
  const std::byte* data = nullptr;
  Shape shape;
  DType dtype = DType::kF32;
  Device device;

  ConstTensorView() = default;
  ConstTensorView(const std::byte* d, Shape s, DType t, Device dev)
      : data(d), shape(s), dtype(t), device(dev) {}
  ConstTensorView(const TensorView& v)  // NOLINT(google-explicit-constructor): implicit on purpose
      : data(v.data), shape(v.shape), dtype(v.dtype), device(v.device) {}

  template <class T>
  const T* as() const {
    UPMOE_CHECK(dtype == DTypeOf<T>::value, "tensor holds {}", name_of(dtype));
    return reinterpret_cast<const T*>(data);
  }
  template <class T>
  const T* if_given() const {
    return given() ? as<T>() : nullptr;
  }
  bool given() const { return shape.rank != 0; }
  std::int64_t elements() const { return shape.elements(); }
  std::size_t bytes() const { return static_cast<std::size_t>(elements()) * size_of(dtype); }
  std::int64_t rows() const { return shape.rank == 0 ? 1 : shape.dim[0]; }
  ConstTensorView rows(std::int64_t begin, std::int64_t end) const;
  ConstTensorView reshape(Shape s) const;
};

// Where an op puts a gradient: added to what is there or, by the first that has one in a step, written over it. A plain
// view is added to.
struct GradientView : TensorView {
  Accumulate mode = Accumulate::kAdd;

  GradientView() = default;
  template <class View>
  requires(std::convertible_to<View, TensorView> && !std::same_as<std::remove_cvref_t<View>, GradientView>)
      GradientView(View&& v, Accumulate m = Accumulate::kAdd)  // NOLINT(google-explicit-constructor)
      : TensorView(static_cast<TensorView>(std::forward<View>(v))), mode(m) {}
  bool adds() const { return mode == Accumulate::kAdd; }
};

// A view of host memory owned by the caller (a vector, say).
template <class T>
TensorView host_view(T* data, Shape shape) {
  return TensorView{reinterpret_cast<std::byte*>(data), shape, DTypeOf<T>::value, Device{}};
}
template <class T>
ConstTensorView host_view(const T* data, Shape shape) {
  return ConstTensorView{reinterpret_cast<const std::byte*>(data), shape, DTypeOf<T>::value, Device{}};
}

// body(T{}) with T = float or bf16: from the dtype of a tensor to a template parameter.
template <class Body>
void with_float_type(DType dtype, Body&& body) {
  if (dtype == DType::kBF16) return body(bf16{});
  UPMOE_CHECK(dtype == DType::kF32, "expected fp32 or bf16, found {}", name_of(dtype));
  body(float{});
}

// Values to the elements of `out`, fp32 or bf16 on the host, from the flat index `at` on.
inline void store_floats(std::span<const float> values, const TensorView& out, std::int64_t at = 0) {
  with_float_type(out.dtype, [&](auto type) {
    using T = decltype(type);
    std::transform(values.begin(), values.end(), out.as<T>() + at, from_float<T>);
  });
}

// Products and sums of sizes that come from files: throw instead of wrapping round.
std::int64_t checked_mul(std::int64_t a, std::int64_t b);
std::int64_t checked_add(std::int64_t a, std::int64_t b);

}  // namespace upmoe
