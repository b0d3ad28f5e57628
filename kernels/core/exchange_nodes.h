#pragma once
// Nodes between which rows of tokens cross: how many there may be where a GPU sorts them, whose launches carry a number
// for each; for configurations as for kernels.

namespace upmoe {

inline constexpr int kMostNodesOfAGpu = 64;

}  // namespace upmoe
