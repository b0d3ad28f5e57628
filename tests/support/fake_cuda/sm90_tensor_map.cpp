// Tensor maps on the CPU, refused by the rules that cuda.h gives cuTensorMapEncodeTiled, for maps of bf16 without
// interleaving, under the 128-byte swizzle. Steps of elements are always one here. The formula beside the rules, by
// which a dimension's stride grows out of the one before, is read as the assertion that ends it says: the maps of gates
// and ups step over neurons before they step from gate to up.

#include "kernels/cuda/sm90/tensor_map.cuh"

#include <string>

#include "tests/support/fake_cuda/sm90_machine.h"

namespace upmoe::cuda::sm90 {

using sm90_twin::fail;

TensorMap make_tensor_map(const void* base, std::initializer_list<std::int64_t> sizes,
                          std::initializer_list<std::int64_t> strides, std::initializer_list<int> box) {
  constexpr std::int64_t kElement = 2, kMostSize = std::int64_t{1} << 32, kMostStride = std::int64_t{1} << 40;
  TensorMap map;
  map.base = static_cast<const unsigned char*>(base);
  map.rank = static_cast<int>(sizes.size());
  if (reinterpret_cast<std::uintptr_t>(base) % 16 != 0) fail("tensor map: the address is no multiple of 16");
  if (sizes.size() < 1 || sizes.size() > 5 || strides.size() + 1 != sizes.size() ||
      box.size() != sizes.size())
    fail("tensor map: sizes, strides and box do not fit");
  const std::int64_t box_row = *box.begin() * kElement, row = *sizes.begin() * kElement;
  if (box_row > 128) fail("tensor map: a box wider than the swizzle");
  if (box_row % 16 != 0) fail("tensor map: a box whose rows are no multiple of 16 bytes");
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    map.size[i] = sizes.begin()[i];
    map.stride[i] = i == 0 ? kElement : strides.begin()[i - 1];
    map.box[i] = box.begin()[i];
    if (map.size[i] < 1 || map.size[i] > kMostSize) fail("tensor map: a size that is none");
    if (map.box[i] < 1 || map.box[i] > 256) fail("tensor map: a box of none, or of more than 256");
    if (i == 0) continue;
    if (map.stride[i] % 16 != 0 || map.stride[i] < 0 || map.stride[i] >= kMostStride)
      fail("tensor map: a stride that is no multiple of 16, or too long");
    if (map.stride[i] < row) fail("tensor map: rows that overlap");
    if (map.stride[i] < map.size[i - 1]) fail("tensor map: a stride below the size of the dimension before");
  }
  return map;
}

}  // namespace upmoe::cuda::sm90
