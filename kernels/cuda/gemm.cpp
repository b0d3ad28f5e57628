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
  const DenseKernel kernel = chosen(d, gpu_of(ex));
  const bool fills_first = kernel == DenseKernel::kFillThenCublasLt;
  if (kernel == DenseKernel::kFill || fills_first) start_from_bias(ex, c_MN, bias_N);
  if (kernel == DenseKernel::kNone || kernel == DenseKernel::kFill) return;
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
                                              .bias = fills_first ? nullptr : bias_N.data});
}

}  // namespace upmoe::cuda
