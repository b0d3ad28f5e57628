#pragma once
// What every op entry asks of its tensors.

#include <source_location>
#include <string_view>

#include "kernels/core/exec.h"

namespace upmoe::ops {

// The tensor has this shape and dtype and lies on the op's device; `where` is the op, for the message.
inline void check_tensor(const Exec& ex, const ConstTensorView& t, const Shape& shape, DType dtype,
                         std::string_view name,
                         std::source_location where = std::source_location::current()) {
  if (t.shape != shape || t.dtype != dtype) [[unlikely]]
    fail_check("tensor matches", where,
               fmt::format("{} is {} {}, expected {} {}", name, name_of(t.dtype), t.shape.str(),
                           name_of(dtype), shape.str()));
  const bool has_data = t.data != nullptr || ex.device.type == DeviceType::kDry || t.elements() == 0;
  if (!(t.device == ex.device) || !has_data) [[unlikely]]
    fail_check("tensor lies on the op's device", where,
               fmt::format("{}: {}", name, has_data ? "another device" : "no memory"));
}

inline void check_float(const ConstTensorView& t, std::string_view name,
                        std::source_location where = std::source_location::current()) {
  if (t.dtype != DType::kF32 && t.dtype != DType::kBF16) [[unlikely]]
    fail_check("fp32 or bf16", where, fmt::format("{} is {}", name, name_of(t.dtype)));
}

// A gradient may be kept in fp32 whatever the dtype of its values.
inline void check_float_or(const ConstTensorView& t, DType dtype, std::string_view name,
                           std::source_location where = std::source_location::current()) {
  if (t.dtype != DType::kF32 && t.dtype != dtype) [[unlikely]]
    fail_check("fp32 or the inputs' dtype", where,
               fmt::format("{} is {}, expected fp32 or {}", name, name_of(t.dtype), name_of(dtype)));
}

// For ops that need temporary memory; the dry device computes nothing and needs none.
inline void check_scratch(const Exec& ex, std::source_location where = std::source_location::current()) {
  if (ex.scratch == nullptr && ex.device.type != DeviceType::kDry) [[unlikely]]
    fail_check("ex.scratch != nullptr", where, "this op takes temporary memory");
}

inline double bytes_of(const ConstTensorView& t) {
  return static_cast<double>(t.bytes());
}
// Of what is read of a gradient's memory before it is written.
inline double bytes_if_added(const GradientView& t) {
  return t.adds() ? bytes_of(t) : 0.0;
}

}  // namespace upmoe::ops
