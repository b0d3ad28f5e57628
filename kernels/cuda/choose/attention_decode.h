#pragma once
// Which kernel computes attention over a cache.

#include <string>

#include "kernels/core/tensor.h"
#include "kernels/cuda/choose/gpu.h"
#include "kernels/ops/attention.h"

namespace upmoe::cuda {

struct DecodeDescription {
  AttentionShape shape;              // but for seq_len
  std::int64_t tokens = 0, run = 0;  // CachedTokens'
  DType dtype = DType::kF32;
};

// Every token by itself; or those of the run by tiles of queries and keys, the others being of no row.
enum class DecodeKernel : std::uint8_t { kTokens, kRun };

DecodeKernel choose(const DecodeDescription& d, const Gpu& gpu);
std::string words_of(const DecodeDescription& d);
std::string words_of(DecodeKernel c);

}  // namespace upmoe::cuda
