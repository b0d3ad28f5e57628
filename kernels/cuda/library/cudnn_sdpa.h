#pragma once
// Attention by cuDNN, where the build has it: bf16, causal, whole sequences or documents whose runs the host knows
// (AttentionShape::runs), with or without a window, one or several heads to a key head.

#include <string>

#include "kernels/core/exec.h"
#include "kernels/cuda/library/sdpa_slices.h"
#include "kernels/ops/attention.h"

namespace upmoe::cuda {

bool has_cudnn();             // this program was built with it
std::size_t cudnn_version();  // 91300 for 9.13.0; 0: built without

// Why cuDNN does not take attention of this shape here; empty when it does. Plans are made at a shape's first use
// and kept with the stream.
std::string sdpa_refusal(const Exec& ex, const AttentionShape& shape, std::int64_t tokens);

// Why cuDNN's frontend would not take the graph of this shape on a GPU of compute capability `sm` (90); empty
// when it would. Needs no GPU: the library's own word comes when a plan is made.
std::string sdpa_refusal(const AttentionShape& shape, std::int64_t tokens, bool backward, int sm);

// How much temporary memory the deterministic backward may take at once (sdpa_slices.h): 2 GiB, or what a test says.
std::int64_t sdpa_workspace();
void limit_sdpa_workspace(std::int64_t bytes);

// stats_BHS: the log-sum-exp of each row as cuDNN keeps it, [sequences, heads, seq_len], fp32. Temporary
// memory comes from ex.scratch.
void sdpa_forward(Exec& ex, TensorView out_TQ, TensorView stats_BHS, ConstTensorView qkv_TH,
                  const AttentionShape& shape);
void sdpa_backward(Exec& ex, TensorView dqkv_TH, ConstTensorView dout_TQ, ConstTensorView qkv_TH,
                   ConstTensorView out_TQ, ConstTensorView stats_BHS, const AttentionShape& shape);

// The same for one slice of the documents, whose table lies on the device: their rows alone are written.
// stats_BHS: [slice.batch, the slice's heads, slice.length]; behind a document's end without meaning.
void sdpa_forward(Exec& ex, TensorView out_TQ, TensorView stats_BHS, ConstTensorView qkv_TH,
                  const AttentionShape& shape, const DocumentSlice& slice, const DocumentTable& table);
struct SdpaSaved {
  ConstTensorView qkv_TH, out_TQ, stats_BHS;
};
void sdpa_backward(Exec& ex, TensorView dqkv_TH, ConstTensorView dout_TQ, const SdpaSaved& saved,
                   const AttentionShape& shape, const DocumentSlice& slice, const DocumentTable& table);

}  // namespace upmoe::cuda
