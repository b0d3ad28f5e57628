#pragma once
// Tensor maps of bf16 for the copy engine: what a box of a tensor is, under the 128-byte swizzle, zeros outside.

#include <initializer_list>

#include "kernels/cuda/sm90/sm90.cuh"

namespace upmoe::cuda::sm90 {

// `sizes` in elements, the fastest dimension first; `strides` in bytes, of all dimensions but that one; `box` in
// elements, at most 64 of the fastest. Addresses and strides are multiples of 16. Throws where the driver refuses.
TensorMap make_tensor_map(const void* base, std::initializer_list<std::int64_t> sizes,
                          std::initializer_list<std::int64_t> strides, std::initializer_list<int> box);

}  // namespace upmoe::cuda::sm90
