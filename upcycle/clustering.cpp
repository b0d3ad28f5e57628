#include "upcycle/clustering.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "kernels/core/check.h"

namespace upmoe {
namespace {

constexpr std::int64_t kFar = std::numeric_limits<std::int64_t>::max() / 4;

std::size_t at(std::int64_t i) {
  return static_cast<std::size_t>(i);
}

// Rows placed so far, and what it costs to let one move on to another group.
class Assignment {
 public:
  Assignment(std::span<const std::int64_t> cost_RG, std::int64_t groups, std::int64_t size)
      : cost_RG_(cost_RG), groups_(groups), size_(size), members_(at(groups)), moves_(at(groups * groups)) {}

  void place(std::int32_t row) {
    // The cheapest way from the row into each group, through groups whose members move on. Costs of moves may be
    // negative, cycles of them may not: what is placed is optimal.
    std::vector<std::int64_t> distance(at(groups_)), before(at(groups_), -1);
    for (std::int64_t g = 0; g < groups_; ++g) distance[at(g)] = cost(row, g);
    for (bool changed = true; changed;) {
      changed = false;
      for (std::int64_t a = 0; a < groups_; ++a)
        for (std::int64_t b = 0; b < groups_; ++b) {
          const Move& move = moves_[at(a * groups_ + b)];
          if (move.row < 0 || distance[at(a)] + move.cost >= distance[at(b)]) continue;
          distance[at(b)] = distance[at(a)] + move.cost;
          before[at(b)] = a;
          changed = true;
        }
    }
    std::int64_t end = -1;
    for (std::int64_t g = 0; g < groups_; ++g)
      if (static_cast<std::int64_t>(members_[at(g)].size()) < size_ &&
          (end < 0 || distance[at(g)] < distance[at(end)]))
        end = g;
    // From the end backwards: the member that moves on makes room for who comes.
    for (std::int64_t g = end; before[at(g)] >= 0; g = before[at(g)]) {
      const std::int64_t from = before[at(g)];
      const std::int32_t moved = moves_[at(from * groups_ + g)].row;
      std::erase(members_[at(from)], moved);
      members_[at(g)].push_back(moved);
      end = from;
    }
    members_[at(end)].push_back(row);
    for (std::int64_t g = 0; g < groups_; ++g) find_moves(g);
  }

  std::vector<std::int32_t> groups_of_rows() const {
    std::vector<std::int32_t> groups(at(groups_ * size_), -1);
    for (std::int64_t g = 0; g < groups_; ++g)
      for (const std::int32_t row : members_[at(g)]) groups[at(row)] = static_cast<std::int32_t>(g);
    return groups;
  }

 private:
  struct Move {
    std::int32_t row = -1;
    std::int64_t cost = kFar;
  };
  std::int64_t cost(std::int32_t row, std::int64_t g) const { return cost_RG_[at(row * groups_ + g)]; }
  // Out of group `from`, where its members are others than last time.
  void find_moves(std::int64_t from);

  std::span<const std::int64_t> cost_RG_;
  std::int64_t groups_, size_;
  std::vector<std::vector<std::int32_t>> members_;
  std::vector<Move> moves_;                      // from * groups + to
  std::vector<std::vector<std::int32_t>> seen_;  // the members of each group for which `moves_` was found
};

void Assignment::find_moves(std::int64_t from) {
  seen_.resize(at(groups_));
  const std::vector<std::int32_t>& members = members_[at(from)];
  if (seen_[at(from)] == members) return;
  seen_[at(from)] = members;
  for (std::int64_t to = 0; to < groups_; ++to) {
    Move& move = moves_[at(from * groups_ + to)];
    move = {};
    if (to == from) continue;
    for (const std::int32_t row : members) {
      const std::int64_t more = cost(row, to) - cost(row, from);
      if (move.row < 0 || more < move.cost || (more == move.cost && row < move.row)) move = {row, more};
    }
  }
}

// The `count` of `among` with the largest number, the lowest first among equals.
std::vector<std::int32_t> most(std::vector<std::int32_t> among, const std::vector<std::int64_t>& number,
                               std::int64_t count) {
  std::stable_sort(among.begin(), among.end(),
                   [&](std::int32_t a, std::int32_t b) { return number[at(a)] > number[at(b)]; });
  among.resize(at(count));
  return among;
}

std::vector<std::int32_t> without(const std::vector<std::int32_t>& all, std::vector<std::int32_t> taken) {
  std::sort(taken.begin(), taken.end());
  std::vector<std::int32_t> rest;
  std::set_difference(all.begin(), all.end(), taken.begin(), taken.end(), std::back_inserter(rest));
  return rest;
}

template <class Visit>
void for_each_token(const ActiveNeurons& active, const Visit& visit) {
  for (std::int64_t t = 0; t < active.tokens(); ++t)
    visit(std::span(active.lists).subspan(at(t * active.per_token), at(active.per_token)));
}

// Distance of every row's neuron from every seed: count + count - 2 * (tokens at which both are active).
std::vector<std::int64_t> distances(const ActiveNeurons& active, const std::vector<std::int64_t>& counts,
                                    const std::vector<std::int32_t>& rows,
                                    const std::vector<std::int32_t>& seeds) {
  const auto groups = static_cast<std::int64_t>(seeds.size());
  std::vector<std::int64_t> row_of(at(active.neurons), -1), seed_of(at(active.neurons), -1);
  for (std::size_t r = 0; r < rows.size(); ++r) row_of[at(rows[r])] = static_cast<std::int64_t>(r);
  for (std::size_t g = 0; g < seeds.size(); ++g) seed_of[at(seeds[g])] = static_cast<std::int64_t>(g);
  std::vector<std::int64_t> cost_RG;
  for (const std::int32_t row : rows)
    for (const std::int32_t seed : seeds) cost_RG.push_back(counts[at(row)] + counts[at(seed)]);
  for_each_token(active, [&](std::span<const std::int32_t> list) {
    for (const std::int32_t a : list)
      for (const std::int32_t b : list)
        if (row_of[at(a)] >= 0 && seed_of[at(b)] >= 0)
          cost_RG[at(row_of[at(a)] * groups + seed_of[at(b)])] -= 2;
  });
  return cost_RG;
}

}  // namespace

std::vector<std::int32_t> balanced_assignment(std::span<const std::int64_t> cost_RG, std::int64_t groups,
                                              std::int64_t size) {
  UPMOE_CHECK(groups > 0 && static_cast<std::int64_t>(cost_RG.size()) == groups * size * groups,
              "{} costs for {} groups of {}", cost_RG.size(), groups, size);
  Assignment assignment(cost_RG, groups, size);
  for (std::int64_t row = 0; row < groups * size; ++row) assignment.place(static_cast<std::int32_t>(row));
  return assignment.groups_of_rows();
}

Clusters cluster_neurons(const ActiveNeurons& active, std::int64_t shared, std::int64_t experts) {
  UPMOE_CHECK(active.per_token > 0 && experts > 0 && active.neurons > shared &&
                  (active.neurons - shared) % experts == 0,
              "{} neurons, {} shared, {} experts", active.neurons, shared, experts);
  const std::int64_t width = (active.neurons - shared) / experts;
  std::vector<std::int64_t> counts(at(active.neurons), 0);
  for (const std::int32_t neuron : active.lists) ++counts[at(neuron)];
  std::vector<std::int32_t> all(at(active.neurons));
  std::iota(all.begin(), all.end(), 0);
  Clusters clusters;
  clusters.order = most(all, counts, shared);
  const std::vector<std::int32_t> rest = without(all, clusters.order), seeds = most(rest, counts, experts);
  const std::vector<std::int32_t> group_of_row =
      balanced_assignment(distances(active, counts, rest, seeds), experts, width);

  std::vector<std::int32_t> group(at(active.neurons), -1);
  for (std::size_t r = 0; r < rest.size(); ++r) group[at(rest[r])] = group_of_row[r];
  // From the mean of its expert a neuron is as far as, up to what all of the expert have alike, the sum over the tokens
  // at which it is active of 1 - 2 * (the share of the expert that is): here times the width, in whole numbers.
  std::vector<std::int64_t> far(at(active.neurons), 0), together(at(experts));
  for_each_token(active, [&](std::span<const std::int32_t> list) {
    std::fill(together.begin(), together.end(), 0);
    for (const std::int32_t a : list)
      if (group[at(a)] >= 0) ++together[at(group[at(a)])];
    for (const std::int32_t a : list)
      if (group[at(a)] >= 0) far[at(a)] += width - 2 * together[at(group[at(a)])];
  });
  for (std::int64_t e = 0; e < experts; ++e) {
    std::int32_t nearest = -1;
    for (const std::int32_t neuron : rest) {
      if (group[at(neuron)] != e) continue;
      clusters.order.push_back(neuron);
      if (nearest < 0 || far[at(neuron)] < far[at(nearest)]) nearest = neuron;
    }
    clusters.representatives.push_back(nearest);
  }
  return clusters;
}

}  // namespace upmoe
