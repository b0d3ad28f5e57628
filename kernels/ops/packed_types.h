#pragma once
// From the dtypes of packed tensors and of the memory that they lie in (pack.h) to template parameters.

#include <span>

#include "kernels/core/tensor.h"

namespace upmoe::ops {

// body(T{}, P{}) of the tensors' type and that of the packed memory; nothing where there are no tensors.
template <class View, class Body>
void with_packed_types(std::span<const View> tensors, DType packed, const Body& body) {
  if (tensors.empty()) return;
  with_float_type(tensors[0].dtype, [&](auto type) {
    with_float_type(packed, [&](auto packed_type) { body(type, packed_type); });
  });
}

}  // namespace upmoe::ops
