#include "trainer/model/expert_shares.h"

namespace upmoe {

// 4 experts on 4 ranks with etp 2: two ranks share two experts, each with a piece of both.
//
//   rank                 0           1           2           3
//   experts             0, 1        0, 1        2, 3        2, 3
//   piece of each        0           1           0           1
//   numbered            0, 1        2, 3        4, 5        6, 7      a rank's pieces follow each other
Range ExpertShares::pieces_of(int rank, int ranks) const {
  const Range experts = balanced(num_experts, ranks / etp, rank / etp);
  const std::int64_t begin = experts.begin * etp + rank % etp * experts.size();
  return {begin, begin + experts.size()};
}

std::vector<std::int32_t> ExpertShares::numbers(int ranks) const {
  std::vector<std::int32_t> piece_EP(static_cast<std::size_t>(pieces()));
  for (int rank = 0; rank < ranks; ++rank) {
    const Range experts = balanced(num_experts, ranks / etp, rank / etp);
    std::int64_t piece = pieces_of(rank, ranks).begin;
    for (std::int64_t e = experts.begin; e < experts.end; ++e)
      piece_EP[static_cast<std::size_t>(e * etp + rank % etp)] = static_cast<std::int32_t>(piece++);
  }
  return piece_EP;
}

PieceMap whole_map(const ExpertShares& shares, int ranks) {
  PieceMap map;
  for (int r = 0; r < ranks; ++r) map.of_rank.push_back(shares.pieces_of(r, ranks));
  return map;
}

PieceMap node_map(const ExpertShares& shares, int ranks, int ranks_per_node, int node) {
  PieceMap map;
  map.nodes = nodes_with_experts(node_begins(shares, ranks, ranks_per_node));
  const std::int64_t first = shares.pieces_of(node * ranks_per_node, ranks).begin;
  for (int r = node * ranks_per_node; r < (node + 1) * ranks_per_node; ++r) {
    const Range pieces = shares.pieces_of(r, ranks);
    map.of_rank.push_back({pieces.begin - first, pieces.end - first});
  }
  return map;
}

std::vector<std::int64_t> node_begins(const ExpertShares& shares, int ranks, int ranks_per_node) {
  std::vector<std::int64_t> begins;
  for (int r = 0; r < ranks; r += ranks_per_node) begins.push_back(shares.pieces_of(r, ranks).begin);
  begins.push_back(shares.pieces());
  return begins;
}

std::int64_t nodes_with_experts(const std::vector<std::int64_t>& node_begins) {
  std::int64_t nodes = 0;
  for (std::size_t m = 0; m + 1 < node_begins.size(); ++m)
    nodes += node_begins[m] < node_begins[m + 1] ? 1 : 0;
  return nodes;
}

}  // namespace upmoe
