#include "kernels/ops/capacity.h"

#include <algorithm>
#include <bit>
#include <vector>

#include "kernels/cpu/router_rows.h"
#include "kernels/ops/backend.h"
#include "kernels/ops/weight_order.h"

namespace upmoe::cpu {

namespace {

// One pool: its assignments in the order of places, first choices before second ones.
class Pool {
 public:
  Pool(const PooledChoices& choices, const CapacityRule& rule, std::int64_t number)
      : index_(choices.index_NK.as<std::int32_t>()),
        weight_(choices.weight_NK.given() ? choices.weight_NK.as<float>() : nullptr),
        row_(choices.row_N.as<std::int32_t>() + number * rule.pool),
        tokens_(rule.pool),
        k_(choices.index_NK.shape[1]) {}

  // Where the i-th assignment lies.
  std::int64_t at(std::int64_t i) const { return row_[i % tokens_] * k_ + i / tokens_; }
  std::int64_t size() const { return tokens_ * k_; }
  std::int32_t expert(std::int64_t i) const { return index_[at(i)]; }
  // Weights are not below 0, so their bits are in their order.
  std::uint32_t key(std::int64_t i) const {
    return weight_ == nullptr ? 0 : std::bit_cast<std::uint32_t>(compared_weight(weight_[at(i)]));
  }
  bool weighed() const { return weight_ != nullptr; }

 private:
  const std::int32_t* index_;
  const float* weight_;
  const std::int32_t* row_;
  std::int64_t tokens_, k_;
};

void limit_pool(std::int32_t* kept, float* lost, const Pool& pool, std::int64_t experts,
                std::int64_t capacity) {
  std::vector<std::vector<std::int64_t>> of_expert(static_cast<std::size_t>(experts));
  for (std::int64_t i = 0; i < pool.size(); ++i) {
    kept[pool.at(i)] = -1;
    if (pool.expert(i) >= 0) of_expert[static_cast<std::size_t>(pool.expert(i))].push_back(i);
  }
  for (std::int64_t e = 0; e < experts; ++e) {
    std::vector<std::int64_t>& all = of_expert[static_cast<std::size_t>(e)];
    // Stable: among equal weights the order of places stays.
    if (pool.weighed())
      std::stable_sort(all.begin(), all.end(),
                       [&](std::int64_t a, std::int64_t b) { return pool.key(a) > pool.key(b); });
    const auto wanted = static_cast<std::int64_t>(all.size()), taken = std::min(wanted, capacity);
    for (std::int64_t i = 0; i < taken; ++i)
      kept[pool.at(all[static_cast<std::size_t>(i)])] = static_cast<std::int32_t>(e);
    lost[e] = static_cast<float>(wanted - taken);
  }
}

}  // namespace

void limit_choices(Exec&, TensorView kept_NK, TensorView lost_GE, const PooledChoices& choices,
                   const CapacityRule& rule) {
  const std::int64_t tokens = choices.index_NK.shape[0], k = choices.index_NK.shape[1],
                     pools = lost_GE.shape[0], experts = lost_GE.shape[1];
  require_in_range(choices.index_NK.as<std::int32_t>(), tokens * k, experts, "index_NK", -1);
  require_in_range(choices.row_N.as<std::int32_t>(), tokens, tokens, "row_N");
  parallel_for(pools, rule.pool * k, [&](std::int64_t g) {
    limit_pool(kept_NK.as<std::int32_t>(), lost_GE.as<float>() + g * experts, Pool(choices, rule, g), experts,
               rule.capacity);
  });
}

}  // namespace upmoe::cpu
