#include "kernels/cuda/choose/attention.h"

#include <fmt/format.h>

namespace upmoe::cuda {

namespace {

// Why bf16, which cuDNN computes, goes to the portable kernel, which is slow; empty where it does not.
std::string why_portable(const AttentionDescription& d, const Gpu& gpu) {
  const AttentionShape& s = d.shape;
  if (d.pair)
    return "attention in bf16 under context parallelism (parallel.cp): the portable kernel computes it, "
           "which is slow "
           "on GPUs";
  if (d.documents && !d.runs)
    return "attention in bf16 with documents masked that are known by token "
           "alone: the portable kernel computes it, which is slow on GPUs";
  if (!gpu.cudnn)
    return "attention in bf16: the portable kernel computes it, which is slow: this program was "
           "built without cuDNN or its frontend's headers (launch/setup.sh puts those into .venv)";
  if (s.head_dim % 8 != 0 || s.head_dim > 128)
    return fmt::format(
        "attention in bf16 of heads of {}: the portable kernel computes it, which is slow; cuDNN takes "
        "multiples of 8 "
        "up to 128",
        s.head_dim);
  if (!d.refusal.empty())
    return fmt::format(
        "attention of {} heads of {} over {} sequences of {}{}: the portable kernel computes it; cuDNN: {}",
        s.heads, s.head_dim, d.tokens / s.seq_len, s.seq_len, d.documents ? " with documents masked" : "",
        d.refusal);
  return {};
}

}  // namespace

AttentionChoice choose(const AttentionDescription& d, const Gpu& gpu) {
  if (d.dtype != DType::kBF16 || d.tokens == 0) return {};
  std::string why = why_portable(d, gpu);
  return {why.empty() ? AttentionKernel::kCudnn : AttentionKernel::kPortable, std::move(why)};
}

std::string words_of(const AttentionDescription& d) {
  const AttentionShape& s = d.shape;
  return fmt::format("attention of {} heads ({} of keys) of {} over {} sequences of {}, {}{}{}{}", s.heads,
                     s.kv_heads, s.head_dim, d.tokens / s.seq_len, s.seq_len, name_of(d.dtype),
                     d.documents ? ", documents" : "", d.pair ? ", a pair of chunks" : "",
                     s.window > 0 ? fmt::format(", a window of {}", s.window) : "");
}

std::string words_of(const AttentionChoice& c) {
  return c.kernel == AttentionKernel::kCudnn ? "cuDNN" : "the portable kernel";
}

}  // namespace upmoe::cuda
