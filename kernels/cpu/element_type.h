#pragma once
// From the dtype of a tensor to a template parameter.

#include "kernels/core/tensor.h"

namespace upmoe::cpu {

// body(T{}) with T = float or bf16.
template <class Body>
inline void with_float_type(DType dtype, Body&& body) {
  if (dtype == DType::kBF16) return body(bf16{});
  UPMOE_CHECK(dtype == DType::kF32, "expected fp32 or bf16, found {}", name_of(dtype));
  body(float{});
}

}  // namespace upmoe::cpu
