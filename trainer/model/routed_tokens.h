#pragma once
// Which tokens a router routes: for what is drawn at random for a token, and for what tokens share or compete for,
// whatever ranks they lie on.

#include <string_view>

#include "kernels/core/philox.h"
#include "kernels/ops/router_draws.h"
#include "kernels/ops/token_groups.h"
#include "parallel/communicator.h"

namespace upmoe {

// Of a micro-batch in training, where a router asks for it; elsewhere there is none, nothing is drawn and nothing
// dropped. A token's place is its position, sequence by sequence.
struct RoutedTokens {
  ConstTensorView place_T;  // int32: of the tokens here
  // int32: of each place of the micro-batch, the row where its token lies, rank by rank of `pool`.
  ConstTensorView row_N;
  std::int64_t seq_len = 0;
  std::uint64_t seed = 0, first = 0;  // first: the number of its first token in the whole run
  std::uint32_t layer = 0;
  Communicator* pool = nullptr;  // the ranks that share the micro-batch

  explicit operator bool() const { return place_T.given(); }
  TokenDraws draws(std::string_view what) const { return {philox_key(seed, what), first, layer, place_T}; }
};

// The groups of tokens that are routed together, in training and outside it, where a router asks for them. All tokens
// of one position lie on the tp ranks of one cp rank: rows are those of these ranks, one behind the other.
struct RoutedGroups {
  TokenGroups tokens;
  Communicator* tp = nullptr;
};

}  // namespace upmoe
