#pragma once
// Which kernel computes cross-entropy over a whole vocabulary.

#include <string>

#include "kernels/core/kernel_paths.h"
#include "kernels/core/tensor.h"
#include "kernels/cuda/choose/gpu.h"

namespace upmoe::cuda {

struct CrossEntropyDescription {
  CrossEntropyPath wish = CrossEntropyPath::kAuto;
  std::int64_t rows = 0, columns = 0;
  bool gradient = false;      // asked for
  DType dtype = DType::kF32;  // of the gradient
  bool packed = false;        // rows of logits and gradients lie at addresses of whole packs of four elements
};

constexpr int kMostRowBlocks = 8;  // of a cluster, on every 9.0; cuda/loss.cpp holds the kernel to it

// A block for each row, which reads it once for the loss and again for the gradient; or a cluster of blocks, which
// keeps it between the two.
enum class CrossEntropyKernel : std::uint8_t { kPortable, kCluster };

struct CrossEntropyChoice {
  CrossEntropyKernel kernel = CrossEntropyKernel::kPortable;
  int blocks = 0;      // of a cluster
  std::string reason;  // why none, where they were asked for; to be said once
};

CrossEntropyChoice choose(const CrossEntropyDescription& d, const Gpu& gpu);
std::string words_of(const CrossEntropyDescription& d);
std::string words_of(const CrossEntropyChoice& c);

}  // namespace upmoe::cuda
