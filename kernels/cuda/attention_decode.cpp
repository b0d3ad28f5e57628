#include "kernels/ops/attention_decode.h"

#include "kernels/cuda/choose/attention_decode.h"
#include "kernels/cuda/choose/chosen.h"
#include "kernels/cuda/gpu_of.cuh"
#include "kernels/cuda/portable/attention_decode.h"
#include "kernels/cuda/portable/attention_run.h"
#include "kernels/ops/backend.h"

namespace upmoe::cuda {

void attention_decode(Exec& ex, TensorView out_TQ, ConstTensorView qkv_TH, const KeyCache& cache,
                      const CachedTokens& tokens, AttentionShape shape) {
  const DecodeDescription d{shape, qkv_TH.rows(), tokens.run, qkv_TH.dtype};
  switch (chosen(d, gpu_of(ex))) {
    case DecodeKernel::kTokens:
      return portable::attend_tokens(ex, out_TQ, qkv_TH, cache, tokens, shape);
    case DecodeKernel::kRun:
      return portable::attend_run(ex, out_TQ, qkv_TH, cache, tokens, shape);
  }
  fail(ExitCode::kFailure, "attention over a cache: no such kernel");
}

}  // namespace upmoe::cuda
