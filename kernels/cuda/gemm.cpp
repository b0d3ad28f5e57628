#include "kernels/ops/gemm.h"

#include "kernels/cuda/choose/chosen.h"
#include "kernels/cuda/choose/dense_product.h"
#include "kernels/cuda/gpu_of.cuh"
#include "kernels/cuda/library/cublaslt.cuh"
#include "kernels/cuda/portable/bias.h"
#include "kernels/ops/backend.h"

namespace upmoe::cuda {

void gemm(Exec& ex, TensorView c_MN, const Factor& a_MK, const Factor& b_KN, Accumulate mode,
          ConstTensorView bias_N) {
  const DenseDescription d{.m = c_MN.shape[0],
                           .n = c_MN.shape[1],
                           .k = a_MK.columns(),
                           .in = a_MK.stored.dtype,
                           .out = c_MN.dtype,
                           .mode = mode,
                           .bias = bias_N.given() ? std::optional(bias_N.dtype) : std::nullopt};
  bool fills_first = false;
  switch (chosen(d, gpu_of(ex))) {  // no default: the compiler names the kernel that is chosen and not called
    case DenseKernel::kNone:
      return;
    case DenseKernel::kFill:
      return start_from_bias(ex, c_MN, bias_N);
    case DenseKernel::kFillThenCublasLt:
      start_from_bias(ex, c_MN, bias_N);
      fills_first = true;
      break;
    case DenseKernel::kCublasLt:
      break;
  }
  stream_of(ex).kept<GemmLibrary>().multiply({.m = d.m,
                                              .n = d.n,
                                              .k = d.k,
                                              .transpose_a = a_MK.transpose,
                                              .transpose_b = b_KN.transpose,
                                              .in = d.in,
                                              .out = d.out,
                                              .mode = fills_first ? Accumulate::kAdd : mode,
                                              .a = a_MK.stored.data,
                                              .b = b_KN.stored.data,
                                              .c = c_MN.data,
                                              .bias = fills_first ? nullptr : bias_N.data,
                                              .algorithms = ex.algorithms});
}

}  // namespace upmoe::cuda
