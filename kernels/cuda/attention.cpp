#include "kernels/ops/attention.h"

#include "kernels/cuda/choose/attention.h"
#include "kernels/cuda/choose/chosen.h"
#include "kernels/cuda/gpu_of.cuh"
#include "kernels/cuda/portable/attention.h"
#include "kernels/ops/backend.h"

namespace upmoe::cuda {

namespace {

AttentionKernel kernel_for(const Exec& ex, AttentionDescription d) {
  const Gpu gpu = gpu_of(ex);
  // cuDNN is asked only where it would be chosen: the answer costs a plan.
  if (choose(d, gpu).kernel == AttentionKernel::kCudnn) d.refusal = sdpa_refusal(ex, d.shape, d.tokens);
  const AttentionChoice choice = chosen(d, gpu);
  if (!choice.warning.empty()) log::warn_once("{}", choice.warning);
  return choice.kernel;
}

// Else it is cuDNN's. No default: the compiler names the kernel that is chosen and not called.
bool is_portable(AttentionKernel kernel) {
  switch (kernel) {
    case AttentionKernel::kPortable:
      return true;
    case AttentionKernel::kCudnn:
      return false;
  }
  fail(ExitCode::kFailure, "attention: no such kernel");
}

AttentionDescription describe(const ConstTensorView& qkv_TH, const AttentionShape& shape,
                              const ConstTensorView& document_T, bool pair) {
  return {.shape = shape,
          .tokens = qkv_TH.shape[0],
          .dtype = qkv_TH.dtype,
          .documents = document_T.given(),
          .pair = pair,
          .refusal = {}};
}

TensorView take_stats(Exec& ex, const ConstTensorView& lse_TN) {
  return ex.scratch->take(lse_TN.shape, DType::kF32, "log-sum-exp by head");
}

}  // namespace

void attention_forward(Exec& ex, TensorView out_TQ, TensorView lse_TN, ConstTensorView qkv_TH,
                       AttentionShape shape, ConstTensorView document_T) {
  if (is_portable(kernel_for(ex, describe(qkv_TH, shape, document_T, false))))
    return portable::attention_forward(ex, out_TQ, lse_TN, qkv_TH, shape, document_T);
  ScratchScope scope(*ex.scratch);
  const TensorView stats_BHS = take_stats(ex, lse_TN);
  sdpa_forward(ex, out_TQ, stats_BHS, qkv_TH, shape);
  // cuDNN keeps the log-sum-exp head by head, the op's contract is token by token.
  portable::order_by_token(ex, lse_TN, stats_BHS, shape);
}

void attention_backward(Exec& ex, TensorView dqkv_TH, ConstTensorView dout_TQ, ConstTensorView qkv_TH,
                        const Attended& saved, AttentionShape shape, ConstTensorView document_T) {
  if (is_portable(kernel_for(ex, describe(qkv_TH, shape, document_T, false))))
    return portable::attention_backward(ex, dqkv_TH, dout_TQ, qkv_TH, saved, shape, document_T);
  ScratchScope scope(*ex.scratch);
  const TensorView stats_BHS = take_stats(ex, saved.lse_TN);
  portable::order_by_head(ex, stats_BHS, saved.lse_TN, shape);
  sdpa_backward(ex, dqkv_TH, dout_TQ, qkv_TH, saved.out_TQ, stats_BHS, shape);
}

namespace {

// One kernel takes pairs of chunks; choosing it says that it is slow.
void choose_for_pair(const Exec& ex, const AttentionDescription& d) {
  UPMOE_CHECK(is_portable(kernel_for(ex, d)), "no other kernel takes {}", words_of(d));
}

}  // namespace

void attention_pair_forward(Exec& ex, TensorView out_TQ, TensorView lse_TN, ConstTensorView qkv_TH,
                            ConstTensorView kv_TK, const ChunkPair& pair) {
  choose_for_pair(ex, describe(qkv_TH, pair.shape, pair.document_T, true));
  portable::attention_pair_forward(ex, out_TQ, lse_TN, qkv_TH, kv_TK, pair);
}

void attention_pair_backward(Exec& ex, const ChunkPairGradients& g, ConstTensorView dout_TQ,
                             ConstTensorView qkv_TH, ConstTensorView kv_TK, const Attended& whole,
                             const ChunkPair& pair) {
  choose_for_pair(ex, describe(qkv_TH, pair.shape, pair.document_T, true));
  portable::attention_pair_backward(ex, g, dout_TQ, qkv_TH, kv_TK, whole, pair);
}

}  // namespace upmoe::cuda
