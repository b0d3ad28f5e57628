#pragma once
// Which kernel computes the products of experts.

#include <string>

#include "kernels/core/tensor.h"
#include "kernels/cuda/choose/gpu.h"

namespace upmoe::cuda {

enum class ExpertsProduct : std::uint8_t { kForward, kInputGradient, kWeightGradient };

// Of ops::grouped_gemm_*, with weights [e, N, K] and `rows` of all experts together.
struct ExpertsDescription {
  ExpertsProduct product = ExpertsProduct::kForward;
  std::int64_t experts = 0, rows = 0, n = 0, k = 0;
  DType in = DType::kF32, out = DType::kF32;
  Accumulate mode = Accumulate::kOverwrite;  // of the weights' gradient
};

enum class ExpertsKernel : std::uint8_t {
  kNone,      // there is nothing to compute
  kZeros,     // products over nothing
  kCublasLt,  // a call for each expert that has rows, side by side on several streams
};

ExpertsKernel choose(const ExpertsDescription& d, const Gpu& gpu);
std::string words_of(const ExpertsDescription& d);  // without the rows, of which every step has others
std::string words_of(ExpertsKernel kernel);

}  // namespace upmoe::cuda
