#include "kernels/cuda/choose/cross_entropy.h"

#include <fmt/format.h>

#include <limits>

namespace upmoe::cuda {

namespace {

// Of the 227 KiB of shared memory that a block of a 9.0 may have, and the 228 of a multiprocessor, of which it takes 1
// for each block: with two rows there, one loads while the other stores. 1 KiB of a block's is for what is no logit.
constexpr std::int64_t kBlockBytes = 226 << 10, kTwoBlocksBytes = 112 << 10;

std::int64_t share_bytes(std::int64_t columns, int blocks) {
  return (columns / 4 + blocks - 1) / blocks * 4 * static_cast<std::int64_t>(sizeof(float));
}

std::string why_no_clusters(const CrossEntropyDescription& d, const Gpu& gpu) {
  if (gpu.sm != 90)
    return fmt::format("they are for GPUs of compute capability 9.0, this one has {}.{}", gpu.sm / 10,
                       gpu.sm % 10);
  if (d.columns % 4 != 0 || !d.packed)
    return fmt::format("rows of {} logits do not lie in whole packs of four", d.columns);
  if (share_bytes(d.columns, kMostRowBlocks) > kBlockBytes)
    return fmt::format("a row of {} logits is more than {} blocks keep", d.columns, kMostRowBlocks);
  if (d.rows > std::numeric_limits<std::int32_t>::max() / kMostRowBlocks)
    return fmt::format("{} rows at once are too many", d.rows);
  return {};
}

}  // namespace

CrossEntropyChoice choose(const CrossEntropyDescription& d, const Gpu& gpu) {
  // Without a gradient both read a row once.
  if (d.wish != CrossEntropyPath::kClusters || !d.gradient || d.rows == 0) return {};
  if (const std::string why = why_no_clusters(d, gpu); !why.empty())
    return {.reason = "kernels.cross_entropy: clusters: " + why + "; the portable kernel takes their place"};
  for (int blocks = 1; blocks < kMostRowBlocks; blocks *= 2)
    if (share_bytes(d.columns, blocks) <= kTwoBlocksBytes) return {CrossEntropyKernel::kCluster, blocks, {}};
  return {CrossEntropyKernel::kCluster, kMostRowBlocks, {}};
}

std::string words_of(const CrossEntropyDescription& d) {
  return fmt::format("cross-entropy of {} columns{}{}", d.columns, d.packed ? "" : ", rows between two packs",
                     d.gradient ? fmt::format(", gradient in {}", name_of(d.dtype)) : "");
}

std::string words_of(const CrossEntropyChoice& c) {
  return c.kernel == CrossEntropyKernel::kCluster ? fmt::format("clusters of {} that keep a row", c.blocks)
                                                  : "the portable kernel";
}

}  // namespace upmoe::cuda
