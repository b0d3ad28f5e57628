#pragma once
// Host tensors of the op tests, with their memory, and their values in double for the references.

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "tests/support/test_device.h"

namespace upmoe::test {

// A tensor on the test device with a copy on the host; whichever was written last is carried to the other
// when that is asked for.
class HostTensor {
 public:
  HostTensor(Shape shape, DType dtype)
      : shape_(shape), dtype_(dtype), memory_(static_cast<std::size_t>(shape.elements()) * size_of(dtype)) {}
  HostTensor(const HostTensor& o) : shape_(o.shape_), dtype_(o.dtype_), memory_(o.host().memory_) {}
  HostTensor(HostTensor&&) = default;
  HostTensor& operator=(const HostTensor& o) { return *this = HostTensor(o); }
  HostTensor& operator=(HostTensor&&) = default;

  operator TensorView() { return view(); }  // NOLINT(google-explicit-constructor): passed to ops as it is
  operator ConstTensorView() const { return on_device(); }  // NOLINT
  TensorView view() {                                       // for an op to write
    const TensorView v = on_device();
    newest_ = on_gpu() ? Newest::kDevice : Newest::kBoth;
    return v;
  }
  TensorView host_view() {  // to read and write
    host();
    newest_ = Newest::kHost;
    return {memory_.data(), shape_, dtype_, Device{}};
  }
  ConstTensorView on_host() const { return {host().memory_.data(), shape_, dtype_, Device{}}; }
  template <class T>
  T* as() {  // on the host, to read and write
    return host_view().as<T>();
  }

  std::size_t size() const { return static_cast<std::size_t>(shape_.elements()); }
  double get(std::size_t i) const {
    const ConstTensorView v = on_host();
    switch (dtype_) {
      case DType::kF32:
        return static_cast<double>(v.as<float>()[i]);
      case DType::kBF16:
        return static_cast<double>(to_float(v.as<bf16>()[i]));
      case DType::kI32:
        return v.as<std::int32_t>()[i];
      case DType::kI64:
        return static_cast<double>(v.as<std::int64_t>()[i]);
      case DType::kF64:
        return v.as<double>()[i];
      case DType::kU8:
        return v.as<std::uint8_t>()[i];
    }
    return 0;
  }
  void set(std::size_t i, double x) {
    const TensorView v = host_view();
    switch (dtype_) {
      case DType::kF32:
        v.as<float>()[i] = static_cast<float>(x);
        break;
      case DType::kBF16:
        v.as<bf16>()[i] = to_bf16(static_cast<float>(x));
        break;
      case DType::kI32:
        v.as<std::int32_t>()[i] = static_cast<std::int32_t>(x);
        break;
      case DType::kI64:
        v.as<std::int64_t>()[i] = static_cast<std::int64_t>(x);
        break;
      case DType::kF64:
        v.as<double>()[i] = x;
        break;
      case DType::kU8:
        v.as<std::uint8_t>()[i] = static_cast<std::uint8_t>(x);
        break;
    }
  }
  std::vector<double> values() const {
    std::vector<double> all(size());
    for (std::size_t i = 0; i < all.size(); ++i) all[i] = get(i);
    return all;
  }
  friend bool operator==(const HostTensor& a, const HostTensor& b) {
    return a.host().memory_ == b.host().memory_;
  }  // bitwise

 private:
  enum class Newest { kBoth, kHost, kDevice };

  const HostTensor& host() const {
    if (newest_ == Newest::kDevice) {
      Exec ex = test_exec();
      ops::download(ex, TensorView{memory_.data(), shape_, dtype_, Device{}}, device_.view(shape_, dtype_));
      newest_ = Newest::kBoth;
    }
    return *this;
  }
  TensorView on_device() const {
    if (!on_gpu()) return {memory_.data(), shape_, dtype_, Device{}};
    Exec ex = test_exec();
    if (device_.bytes() == 0) device_ = Buffer::allocate(ex.device, memory_.size() + 256, "tensor of a test");
    const TensorView v = device_.view(shape_, dtype_);
    if (newest_ == Newest::kHost) {
      ops::upload(ex, v, ConstTensorView{memory_.data(), shape_, dtype_, Device{}});
      newest_ = Newest::kBoth;
    }
    return v;
  }

  Shape shape_;
  DType dtype_;
  mutable std::vector<std::byte> memory_;
  mutable Buffer device_;
  mutable Newest newest_ = Newest::kHost;
};

inline HostTensor tensor_of(Shape shape, DType dtype, const std::vector<double>& values) {
  HostTensor t(shape, dtype);
  UPMOE_CHECK(values.size() == t.size(), "{} values for {}", values.size(), shape.str());
  for (std::size_t i = 0; i < values.size(); ++i) t.set(i, values[i]);
  return t;
}

inline HostTensor filled(Shape shape, DType dtype, double value) {
  HostTensor t(shape, dtype);
  for (std::size_t i = 0; i < t.size(); ++i) t.set(i, value);
  return t;
}

inline HostTensor random_tensor(Shape shape, DType dtype, unsigned seed, double std = 1, double mean = 0) {
  HostTensor t(shape, dtype);
  std::mt19937 random(seed);
  std::normal_distribution<double> normal(mean, std);
  for (std::size_t i = 0; i < t.size(); ++i) t.set(i, normal(random));
  return t;
}

// What op(GradientView) puts over memory of NaNs is what it adds to zeros: nothing of it is read, or left as it was.
template <class Op>
void expect_overwrites(Shape shape, DType dtype, const Op& op) {
  HostTensor over = filled(shape, dtype, NAN), onto = filled(shape, dtype, 0);
  op(GradientView(over, Accumulate::kOverwrite));
  op(GradientView(onto, Accumulate::kAdd));
  EXPECT_EQ(over.values(), onto.values()) << name_of(dtype) << ' ' << shape.str();
}

// A view without memory, for the dry device.
inline TensorView dry_tensor(Shape shape, DType dtype) {
  return {nullptr, shape, dtype, Device{DeviceType::kDry, 0}};
}

inline std::string dtype_label(DType dtype) {
  return name_of(dtype);
}

}  // namespace upmoe::test
