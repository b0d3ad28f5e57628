#include "kernels/cuda/sm90/tensor_map.cuh"

#include <cudaTypedefs.h>

#include <stdexcept>
#include <string>

namespace upmoe::cuda::sm90 {

namespace {

// The driver's function through the runtime, so that nothing links against libcuda.
PFN_cuTensorMapEncodeTiled_v12000 encoder() {
  static const auto found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result{};
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                         &result) != cudaSuccess ||
        result != cudaDriverEntryPointSuccess)
      throw std::runtime_error("the driver has no cuTensorMapEncodeTiled: CUDA 12 or newer is needed");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  return found;
}

template <class Number>
std::string words_of(const char* name, std::initializer_list<Number> numbers) {
  std::string words = name;
  for (const Number n : numbers) words += ' ' + std::to_string(n);
  return words;
}

}  // namespace

TensorMap make_tensor_map(const void* base, std::initializer_list<std::int64_t> sizes,
                          std::initializer_list<std::int64_t> strides, std::initializer_list<int> box) {
  if (sizes.size() > 5 || strides.size() + 1 != sizes.size() || box.size() != sizes.size())
    throw std::runtime_error("tensor map: sizes, strides and box do not fit");
  cuuint64_t size[5], stride[5];
  cuuint32_t boxes[5];
  const cuuint32_t every[5] = {1, 1, 1, 1, 1};
  const auto rank = static_cast<cuuint32_t>(sizes.size());
  for (cuuint32_t i = 0; i < rank; ++i) {
    size[i] = static_cast<cuuint64_t>(sizes.begin()[i]);
    boxes[i] = static_cast<cuuint32_t>(box.begin()[i]);
    if (i > 0) stride[i - 1] = static_cast<cuuint64_t>(strides.begin()[i - 1]);
  }
  // Not the result itself: g++ 12 does not align the place of one that its caller does not keep, and the driver refuses
  // a map at another address.
  TensorMap encoded[1];
  const CUresult status =
      encoder()(encoded, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, rank, const_cast<void*>(base), size, stride, boxes,
                every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    throw std::runtime_error(
        "cuTensorMapEncodeTiled refused a map, status " + std::to_string(status) + ":" +
        words_of(" sizes", sizes) + words_of(", strides", strides) + words_of(", box", box) +
        ", address modulo 256: " + std::to_string(reinterpret_cast<std::uintptr_t>(base) % 256));
  return encoded[0];
}

}  // namespace upmoe::cuda::sm90
