#pragma once
// Which kernel computes a dense product.

#include <optional>
#include <string>

#include "kernels/core/tensor.h"
#include "kernels/cuda/choose/gpu.h"

namespace upmoe::cuda {

// Of ops::gemm: c [M, N] (+)= op(a) op(b) [+ bias].
struct DenseDescription {
  std::int64_t m = 0, n = 0, k = 0;
  DType in = DType::kF32, out = DType::kF32;
  Accumulate mode = Accumulate::kOverwrite;
  std::optional<DType> bias;
};

enum class DenseKernel : std::uint8_t {
  kNone,              // there is nothing to compute
  kFill,              // a product over nothing: the bias in every row, or zeros
  kCublasLt,          // with the bias in its epilogue, which takes one of the result's dtype alone
  kFillThenCublasLt,  // adds to the bias
};

DenseKernel choose(const DenseDescription& d, const Gpu& gpu);
std::string words_of(const DenseDescription& d);
std::string words_of(DenseKernel kernel);

}  // namespace upmoe::cuda
