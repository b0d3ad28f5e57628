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

}  // namespace upmoe
