#include "kernels/cuda/choose/dense_product.h"

namespace upmoe::cuda {

DenseKernel choose(const DenseDescription& d, const Gpu&) {
  if (d.m == 0 || d.n == 0) return DenseKernel::kNone;
  if (d.k == 0) return d.mode == Accumulate::kOverwrite ? DenseKernel::kFill : DenseKernel::kNone;
  return d.bias && *d.bias != d.out ? DenseKernel::kFillThenCublasLt : DenseKernel::kCublasLt;
}

std::string words_of(const DenseDescription& d) {
  return fmt::format("product of {} x {} x {}, {} to {}{}{}", d.m, d.n, d.k, name_of(d.in), name_of(d.out),
                     d.mode == Accumulate::kAdd ? ", added" : "",
                     d.bias ? fmt::format(", bias in {}", name_of(*d.bias)) : "");
}

std::string words_of(DenseKernel kernel) {
  switch (kernel) {
    case DenseKernel::kNone:
      return "nothing";
    case DenseKernel::kFill:
      return "a fill";
    case DenseKernel::kCublasLt:
      return "cuBLASLt";
    case DenseKernel::kFillThenCublasLt:
      return "a fill, then cuBLASLt";
  }
  return {};
}

}  // namespace upmoe::cuda
