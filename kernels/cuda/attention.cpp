#include "kernels/ops/attention.h"

#include <utility>
#include <vector>

#include "kernels/cuda/choose/attention.h"
#include "kernels/cuda/choose/chosen.h"
#include "kernels/cuda/gpu_of.cuh"
#include "kernels/cuda/library/cudnn_sdpa.h"
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
          .runs = !shape.runs.empty(),
          .pair = pair,
          .refusal = {}};
}

TensorView take_stats(Exec& ex, const ConstTensorView& lse_TN) {
  return ex.scratch->take(lse_TN.shape, DType::kF32, "log-sum-exp by head");
}

// In temporary memory of the caller's scope.
DocumentTable place_table(Exec& ex, const AttentionShape& shape, const DocumentSlice& slice) {
  const auto batch = static_cast<std::size_t>(slice.batch), documents = slice.size.size();
  const std::int64_t width = slice.batch + 1;
  std::vector<std::int32_t> host(4 * (batch + 1));
  std::int32_t *qkv = host.data(), *out = qkv + width, *begin = out + width, *size = begin + width;
  for (std::size_t i = 0; i <= batch; ++i) {
    begin[i] = i < documents ? slice.begin[i] : slice.begin.back() + slice.size.back();
    size[i] = i < documents ? slice.size[i] : 0;
    qkv[i] = static_cast<std::int32_t>(begin[i] * shape.qkv_width());
    out[i] = static_cast<std::int32_t>(begin[i] * shape.heads * shape.head_dim);
  }
  DocumentTable table;
  std::int32_t* part = host.data();
  for (ConstTensorView* t : {&table.qkv_offset_b1, &table.out_offset_b1, &table.begin_b, &table.size_b}) {
    const TensorView placed = ex.scratch->take({width}, DType::kI32, "where documents begin and end");
    upload(ex, placed, host_view(std::as_const(part), {width}));
    *t = placed;
    part += width;
  }
  return table;
}

// body(slice, its table, log-sum-exp by head, where its tokens are) for each of the documents' slices.
template <class Body>
void for_documents(Exec& ex, const AttentionShape& shape, std::int64_t most, const Body& body) {
  const std::int64_t group = shape.heads / shape.kv_heads;
  for (const DocumentSlice& slice : document_slices(shape, most)) {
    ScratchScope scope(*ex.scratch);
    const DocumentTable table = place_table(ex, shape, slice);
    const TensorView stats_BHS = ex.scratch->take({slice.batch, group * slice.kv_heads, slice.length},
                                                  DType::kF32, "log-sum-exp by document and head");
    body(slice, table, stats_BHS,
         portable::TokenRuns{table.begin_b, table.size_b, group * slice.first_kv_head});
  }
}

}  // namespace

void attention_forward(Exec& ex, TensorView out_TQ, TensorView lse_TN, ConstTensorView qkv_TH,
                       AttentionShape shape, ConstTensorView document_T) {
  if (is_portable(kernel_for(ex, describe(qkv_TH, shape, document_T, false))))
    return portable::attention_forward(ex, out_TQ, lse_TN, qkv_TH, shape, document_T);
  if (document_T.given())
    return for_documents(ex, shape, 0,
                         [&](const auto& slice, const auto& table, auto stats_BHS, const auto& runs) {
                           sdpa_forward(ex, out_TQ, stats_BHS, qkv_TH, shape, slice, table);
                           portable::order_by_token(ex, lse_TN, stats_BHS, runs);
                         });
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
  if (document_T.given())
    return for_documents(
        ex, shape, ex.deterministic ? sdpa_workspace() : 0,
        [&](const auto& slice, const auto& table, auto stats_BHS, const auto& runs) {
          portable::order_by_head(ex, stats_BHS, saved.lse_TN, runs);
          sdpa_backward(ex, dqkv_TH, dout_TQ, {qkv_TH, saved.out_TQ, stats_BHS}, shape, slice, table);
        });
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
