// The driver's encoder of tensor maps on the CPU, for maps of bf16 without interleaving, under the 128-byte swizzle,
// zeros outside: it refuses with words what cuda.h says that cuTensorMapEncodeTiled refuses. The formula beside those
// rules, by which a dimension's stride grows out of the one before, is read as the assertion that ends it says: the
// maps of gates and ups step over neurons before they step from gate to up.

#include <string>

#include "tests/support/fake_cuda/sm90_machine.h"

using sm90_twin::fail;

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* steps, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                                CUtensorMapFloatOOBfill fill) {
  constexpr cuuint64_t kElement = 2, kMostSize = cuuint64_t{1} << 32, kMostStride = cuuint64_t{1} << 40;
  constexpr cuuint32_t kMostBox = 256, kMostStep = 8;
  if (type != CU_TENSOR_MAP_DATA_TYPE_BFLOAT16) fail("tensor map: elements other than bf16 have no model");
  if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE) fail("tensor map: interleaving has no model");
  if (swizzle != CU_TENSOR_MAP_SWIZZLE_128B) fail("tensor map: only the 128-byte swizzle has a model");
  if (fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) fail("tensor map: only zeros outside have a model");
  if (reinterpret_cast<std::uintptr_t>(map) % 64 != 0)
    fail("tensor map: its own address is no multiple of 64");
  if (reinterpret_cast<std::uintptr_t>(base) % 16 != 0) fail("tensor map: the address is no multiple of 16");
  if (rank < 1 || rank > 5) fail("tensor map: of no dimensions, or of more than five");
  if (box[0] * kElement > 128) fail("tensor map: a box wider than the swizzle");
  if (box[0] * kElement % 16 != 0) fail("tensor map: a box whose rows are no multiple of 16 bytes");
  *map = {};
  map->base = static_cast<const unsigned char*>(base);
  map->rank = static_cast<int>(rank);
  for (cuuint32_t i = 0; i < rank; ++i) {
    if (sizes[i] < 1 || sizes[i] > kMostSize) fail("tensor map: a size that is none");
    if (box[i] < 1 || box[i] > kMostBox) fail("tensor map: a box of none, or of more than 256");
    if (steps[i] < 1 || steps[i] > kMostStep)
      fail("tensor map: a step over no elements, or over more than 8");
    const cuuint64_t stride = i == 0 ? kElement : strides[i - 1];
    const cuuint32_t step = i == 0 ? 1 : steps[i];  // the fastest dimension's is ignored
    map->size[i] = static_cast<std::int64_t>(sizes[i]);
    map->stride[i] = static_cast<std::int64_t>(stride);
    map->box[i] = static_cast<int>((box[i] + step - 1) / step);
    map->step[i] = static_cast<int>(step);
    if (i == 0) continue;
    if (stride % 16 != 0 || stride >= kMostStride)
      fail("tensor map: a stride that is no multiple of 16, or too long");
    if (stride < sizes[0] * kElement) fail("tensor map: rows that overlap");
    if (stride < sizes[i - 1]) fail("tensor map: a stride below the size of the dimension before");
  }
  return CUDA_SUCCESS;
}
