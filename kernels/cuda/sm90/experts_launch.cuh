#pragma once
// What the sources of the experts' kernels share: one of the variants that are compiled, and its launch.

#include <stdexcept>
#include <utility>

#include "kernels/cuda/sm90/cluster_launch.cuh"
#include "kernels/cuda/sm90/expert_pipeline.cuh"

namespace upmoe::cuda::sm90 {

constexpr std::size_t kSharedBytes = std::size_t{227} << 10;  // of a block on every 9.0

template <class Shared, int kBlocks>
ClusterLaunch clusters(const ExpertsLaunch& l) {
  static_assert(sizeof(Shared) <= kSharedBytes);
  return {l.stream, l.multiprocessors / kBlocks * kBlocks, kBlockThreads, kBlocks, sizeof(Shared)};
}

inline Routing routing(const ExpertsLaunch& l, const int* token_R) {
  return {token_R, l.offset_e1, l.experts};
}

// launch(i) with the place of l's variant among `variants`, as a constant.
template <std::size_t kVariants, class Launch>
void launch_variant(const ExpertsLaunch& l, const ExpertVariant (&variants)[kVariants],
                    const Launch& launch) {
  const auto launched = [&]<std::size_t... i>(std::index_sequence<i...>) {
    return ((variants[i] == l.variant && (launch(std::integral_constant<std::size_t, i>()), true)) || ...);
  };
  if (!launched(std::make_index_sequence<kVariants>()))
    throw std::runtime_error("a kernel of the experts in a variant that this program does not have: " +
                             words_of(l.variant));
}

}  // namespace upmoe::cuda::sm90
