#pragma once
// Neurons of a dense FFN that are active together, as experts of equal size. Data in, data out.

#include <cstdint>
#include <span>
#include <vector>

namespace upmoe {

// Of each token the neurons that are most active: `per_token` of them, token by token.
struct ActiveNeurons {
  std::int64_t neurons = 0, per_token = 0;
  std::vector<std::int32_t> lists;  // tokens * per_token
  std::int64_t tokens() const { return static_cast<std::int64_t>(lists.size()) / per_token; }
};

// rows = groups * size; cost_RG[r * groups + g]: of row r in group g. The group of each row, `size` rows in each, with
// the least sum of costs. Rows come one after the other: each takes the cheapest way to a group with room, along which
// others may move on (successive shortest paths, which keeps what is placed optimal).
std::vector<std::int32_t> balanced_assignment(std::span<const std::int64_t> cost_RG, std::int64_t groups,
                                              std::int64_t size);

struct Clusters {
  std::vector<std::int32_t> order;  // all neurons: the shared ones, then expert by expert
  // Of each expert: its neuron nearest to what they have in common.
  std::vector<std::int32_t> representatives;
};

// As CMoE (arXiv 2502.04416). Shared: the `shared` neurons that are active most often. The `experts` most often active
// of the rest are seeds; all of the rest join one of them, equally many each, so that the sum of distances is the
// least. The distance of two neurons is the number of tokens at which one of them alone is active; a representative is
// nearest, in the same sense, to the mean of its expert. Among equals the lowest neuron comes first.
// neurons = shared + experts * width.
Clusters cluster_neurons(const ActiveNeurons& active, std::int64_t shared, std::int64_t experts);

}  // namespace upmoe
