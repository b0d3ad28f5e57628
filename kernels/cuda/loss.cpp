#include "kernels/ops/loss.h"

#include "kernels/cuda/choose/chosen.h"
#include "kernels/cuda/choose/cross_entropy.h"
#include "kernels/cuda/gpu_of.cuh"
#include "kernels/cuda/portable/loss.h"
#include "kernels/cuda/sm90/cross_entropy.cuh"
#include "kernels/ops/backend.h"

namespace upmoe::cuda {

namespace {

static_assert(kMostRowBlocks <= sm90::kShares);  // else blocks would write behind their places

bool at_whole_packs(const ConstTensorView& t) {
  return reinterpret_cast<std::uintptr_t>(t.data) % (4 * size_of(t.dtype)) == 0;
}

void keep_rows(Exec& ex, const TokenLosses& out, const ConstTensorView& logits_CV,
               const ConstTensorView& targets_C, int blocks) {
  const std::int64_t rows = logits_CV.shape[0], columns = logits_CV.shape[1];
  portable::check_targets(ex, targets_C, columns);
  with_float_type(out.dlogits_CV.dtype, [&](auto type) {
    using T = decltype(type);
    sm90::cross_entropy<T>({.stream = stream_of(ex).raw(),
                            .rows = static_cast<int>(rows),
                            .columns = static_cast<int>(columns),
                            .blocks = blocks,
                            .scale = out.scale},
                           out.loss_C.as<float>(), out.dlogits_CV.as<T>(), logits_CV.as<float>(),
                           targets_C.as<std::int32_t>());
  });
}

}  // namespace

void cross_entropy(Exec& ex, const TokenLosses& out, ConstTensorView logits_CV, ConstTensorView targets_C) {
  const bool gradient = out.dlogits_CV.given();
  const CrossEntropyDescription d{
      .wish = ex.cross_entropy,
      .rows = logits_CV.shape[0],
      .columns = logits_CV.shape[1],
      .gradient = gradient,
      .dtype = out.dlogits_CV.dtype,
      .packed = at_whole_packs(logits_CV) && (!gradient || at_whole_packs(out.dlogits_CV))};
  const CrossEntropyChoice choice = chosen(d, gpu_of(ex));
  if (!choice.reason.empty()) log::warn_once("{}", choice.reason);
  switch (choice.kernel) {
    case CrossEntropyKernel::kPortable:
      return portable::cross_entropy(ex, out, logits_CV, targets_C);
    case CrossEntropyKernel::kCluster:
      return keep_rows(ex, out, logits_CV, targets_C, choice.blocks);
  }
  fail(ExitCode::kFailure, "cross-entropy: no such kernel");
}

}  // namespace upmoe::cuda
