#include "kernels/cuda/choose/expert_products.h"

namespace upmoe::cuda {

ExpertsKernel choose(const ExpertsDescription& d, const Gpu&) {
  if (d.product == ExpertsProduct::kWeightGradient) {
    if (d.experts == 0 || d.n == 0 || d.k == 0) return ExpertsKernel::kNone;
    if (d.rows > 0) return ExpertsKernel::kCublasLt;
    return d.mode == Accumulate::kOverwrite ? ExpertsKernel::kZeros : ExpertsKernel::kNone;
  }
  const bool forward = d.product == ExpertsProduct::kForward;
  const std::int64_t columns = forward ? d.n : d.k, depth = forward ? d.k : d.n;
  if (d.rows == 0 || columns == 0) return ExpertsKernel::kNone;
  return depth == 0 ? ExpertsKernel::kZeros : ExpertsKernel::kCublasLt;
}

std::string words_of(const ExpertsDescription& d) {
  static constexpr const char* kProducts[] = {"forward", "gradient of the input", "gradient of the weights"};
  return fmt::format("products of {} experts of {} x {}, {}, {} to {}{}", d.experts, d.n, d.k,
                     kProducts[static_cast<int>(d.product)], name_of(d.in), name_of(d.out),
                     d.mode == Accumulate::kAdd ? ", added" : "");
}

std::string words_of(ExpertsKernel kernel) {
  switch (kernel) {
    case ExpertsKernel::kNone:
      return "nothing";
    case ExpertsKernel::kZeros:
      return "zeros";
    case ExpertsKernel::kCublasLt:
      return "cuBLASLt, a call for each expert";
  }
  return {};
}

}  // namespace upmoe::cuda
