#include "kernels/core/tensor.h"

namespace upmoe {

std::size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kU8:
      return 1;
    case DType::kBF16:
      return 2;
    case DType::kF32:
    case DType::kI32:
      return 4;
    case DType::kI64:
    case DType::kF64:
      return 8;
  }
  UPMOE_CHECK(false, "unknown dtype {}", static_cast<int>(dtype));
  return 0;
}

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "fp32";
    case DType::kBF16:
      return "bf16";
    case DType::kI32:
      return "int32";
    case DType::kI64:
      return "int64";
    case DType::kF64:
      return "fp64";
    case DType::kU8:
      return "uint8";
  }
  return "unknown";
}

Shape::Shape(std::initializer_list<std::int64_t> d) : rank(static_cast<int>(d.size())) {
  UPMOE_CHECK(d.size() <= 4, "a shape has at most 4 dims, found {}", d.size());
  int i = 0;
  for (std::int64_t n : d) {
    UPMOE_CHECK(n >= 0, "negative dim {}", n);
    dim[static_cast<std::size_t>(i++)] = n;
  }
}

std::int64_t Shape::operator[](int i) const {
  const int j = i < 0 ? i + rank : i;
  UPMOE_CHECK(j >= 0 && j < rank, "dim {} of {}", i, str());
  return dim[static_cast<std::size_t>(j)];
}

std::int64_t Shape::elements() const {
  std::int64_t n = 1;
  for (int i = 0; i < rank; ++i) n = checked_mul(n, dim[static_cast<std::size_t>(i)]);
  return n;
}

std::string Shape::str() const {
  std::string s = "[";
  for (int i = 0; i < rank; ++i) s += fmt::format("{}{}", i ? ", " : "", dim[static_cast<std::size_t>(i)]);
  return s + "]";
}

namespace {

template <class View>
View rows_of(const View& v, std::int64_t begin, std::int64_t end) {
  UPMOE_CHECK(v.shape.rank >= 1 && 0 <= begin && begin <= end && end <= v.shape[0], "rows {}..{} of {}",
              begin, end, v.shape.str());
  View r = v;
  r.shape.dim[0] = 1;
  const std::int64_t row_elements = r.shape.elements();
  r.shape.dim[0] = end - begin;
  if (v.data != nullptr) r.data = v.data + static_cast<std::size_t>(begin * row_elements) * size_of(v.dtype);
  return r;
}

template <class View>
View reshaped(const View& v, Shape s) {
  UPMOE_CHECK(s.elements() == v.shape.elements(), "{} as {}", v.shape.str(), s.str());
  View r = v;
  r.shape = s;
  return r;
}

}  // namespace

TensorView TensorView::rows(std::int64_t begin, std::int64_t end) const {
  return rows_of(*this, begin, end);
}
TensorView TensorView::reshape(Shape s) const {
  return reshaped(*this, s);
}
ConstTensorView ConstTensorView::rows(std::int64_t begin, std::int64_t end) const {
  return rows_of(*this, begin, end);
}
ConstTensorView ConstTensorView::reshape(Shape s) const {
  return reshaped(*this, s);
}

std::int64_t checked_mul(std::int64_t a, std::int64_t b) {
  std::int64_t r = 0;
  if (__builtin_mul_overflow(a, b, &r)) fail(ExitCode::kBadInput, "size overflow: {} x {}", a, b);
  return r;
}

std::int64_t checked_add(std::int64_t a, std::int64_t b) {
  std::int64_t r = 0;
  if (__builtin_add_overflow(a, b, &r)) fail(ExitCode::kBadInput, "size overflow: {} + {}", a, b);
  return r;
}

}  // namespace upmoe
