#pragma once
// Which kernel computes attention.

#include <string>

#include "kernels/core/tensor.h"
#include "kernels/cuda/choose/gpu.h"
#include "kernels/ops/attention.h"

namespace upmoe::cuda {

struct AttentionDescription {
  AttentionShape shape;
  std::int64_t tokens = 0;
  DType dtype = DType::kF32;
  bool documents = false;  // masked
  bool runs = false;       // and the host knows where each begins (AttentionShape::runs)
  bool pair = false;       // queries of one chunk against keys of another: context parallelism
  std::string refusal;     // cuDNN's words, where it was asked for a plan of this shape and has none
};

enum class AttentionKernel : std::uint8_t { kPortable, kCudnn };

struct AttentionChoice {
  AttentionKernel kernel = AttentionKernel::kPortable;
  std::string warning;  // to be said once; empty: nothing is lost
};

AttentionChoice choose(const AttentionDescription& d, const Gpu& gpu);
std::string words_of(const AttentionDescription& d);
std::string words_of(const AttentionChoice& c);

}  // namespace upmoe::cuda
