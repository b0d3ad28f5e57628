#pragma once
// Which rank of the exchange holds which piece of which expert. Experts are divided along ep by balanced
// shares, and each expert's width along etp into pieces; a row goes to every piece of the expert it chose,
// and the pieces' outputs add up to the expert's. The group's ranks are ordered ep first, etp innermost, and
// pieces are numbered in the order of the ranks that hold them, so every rank holds a run of numbers.

#include <cstdint>
#include <vector>

#include "parallel/layout.h"

namespace upmoe {

struct ExpertShares {
  std::int64_t num_experts = 0, etp = 1;

  std::int64_t pieces() const { return num_experts * etp; }
  // Of rank `rank` in a group of `ranks` = ep * etp: its experts, in order.
  Range pieces_of(int rank, int ranks) const;
  // [num_experts, etp]: the number of piece j of expert e.
  std::vector<std::int32_t> numbers(int ranks) const;
};

// Which rank of a group holds which pieces: of a whole exchange, or of the ranks of one node in it, counted
// from the node's first piece.
struct PieceMap {
  std::vector<Range> of_rank;
  std::int64_t nodes = 1;  // of this kind, that share all pieces and have some
  std::int64_t pieces() const { return of_rank.back().end; }
};
PieceMap whole_map(const ExpertShares& shares, int ranks);
PieceMap node_map(const ExpertShares& shares, int ranks, int ranks_per_node, int node);
// The first piece of each node, and the number of pieces behind them.
std::vector<std::int64_t> node_begins(const ExpertShares& shares, int ranks, int ranks_per_node);
// Of those, the nodes that have pieces.
std::int64_t nodes_with_experts(const std::vector<std::int64_t>& node_begins);

}  // namespace upmoe
