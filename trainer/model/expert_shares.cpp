#include "trainer/model/expert_shares.h"

namespace upmoe {

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

}  // namespace upmoe
