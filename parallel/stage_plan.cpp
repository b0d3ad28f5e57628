#include "parallel/stage_plan.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <limits>

namespace upmoe {

int StagePlan::stage_of_block(std::int64_t block) const {
  for (std::size_t c = 0; c < chunks.size(); ++c)
    if (chunks[c].begin <= block && block < chunks[c].end) return static_cast<int>(c) % stages;
  UPMOE_CHECK(false, "block {} lies in no chunk", block);
  return 0;
}

StagePlan one_stage(std::int64_t blocks) {
  return {1, {{0, blocks}}, {}};
}

namespace {

struct Costs {
  std::vector<double> before;  // of the blocks before block i
  double first, last;
  std::int64_t blocks() const { return static_cast<std::int64_t>(before.size()) - 1; }
  // Blocks [begin, end) as a chunk, with embedding or head where they belong.
  double of(std::int64_t begin, std::int64_t end) const {
    return before[static_cast<std::size_t>(end)] - before[static_cast<std::size_t>(begin)] +
           (begin == 0 ? first : 0.0) + (end == blocks() ? last : 0.0);
  }
};

}  // namespace

// best[c][n]: the smallest possible largest cost when c chunks take the first n blocks.
StagePlan plan_stages(int stages, int chunks_per_stage, std::span<const double> block_cost, double first,
                      double last) {
  const auto blocks = static_cast<std::int64_t>(block_cost.size());
  const std::int64_t chunks = std::int64_t{stages} * chunks_per_stage;
  if (chunks == 1) return one_stage(blocks);
  StagePlan plan{stages, {}, {}};
  UPMOE_CHECK(1 <= chunks && chunks <= blocks, "{} chunks of {} blocks", chunks, blocks);
  Costs costs{{0.0}, first, last};
  for (const double c : block_cost) costs.before.push_back(costs.before.back() + c);
  const auto width = static_cast<std::size_t>(blocks + 1);
  std::vector<std::vector<double>> best(static_cast<std::size_t>(chunks + 1),
                                        std::vector<double>(width, std::numeric_limits<double>::infinity()));
  std::vector<std::vector<std::int64_t>> begin_of(best.size(), std::vector<std::int64_t>(width, 0));
  best[0][0] = 0;
  for (std::int64_t c = 1; c <= chunks; ++c)
    for (std::int64_t end = c; end <= blocks - (chunks - c); ++end)
      for (std::int64_t begin = c - 1; begin < end; ++begin) {
        const auto i = static_cast<std::size_t>(c), e = static_cast<std::size_t>(end);
        // The last of c chunks takes blocks [begin, end), the c - 1 before it share the rest as well as they can. Every
        // chunk has at least one block, which is what the bounds of the loops leave room for.
        const double worst = std::max(best[i - 1][static_cast<std::size_t>(begin)], costs.of(begin, end));
        if (worst < best[i][e]) {
          best[i][e] = worst;
          begin_of[i][e] = begin;
        }
      }
  // Back from the last chunk, along the cuts that made the best.
  std::int64_t end = blocks;
  for (std::int64_t c = chunks; c > 0; --c) {
    const std::int64_t begin = begin_of[static_cast<std::size_t>(c)][static_cast<std::size_t>(end)];
    plan.chunks.insert(plan.chunks.begin(), {begin, end});
    plan.share.insert(plan.share.begin(), costs.of(begin, end) / costs.of(0, blocks));
    end = begin;
  }
  return plan;
}

std::string describe(const StagePlan& plan) {
  const auto stages = static_cast<std::size_t>(plan.stages);
  std::string text;
  for (std::size_t stage = 0; stage < stages; ++stage) {
    double share = plan.share.empty() ? 1 : 0;
    std::vector<std::string> runs;
    for (std::size_t c = stage; c < plan.chunks.size(); c += stages) {
      const Range& r = plan.chunks[c];
      runs.push_back(r.size() == 1 ? fmt::format("{}", r.begin) : fmt::format("{}-{}", r.begin, r.end - 1));
      if (!plan.share.empty()) share += plan.share[c];
    }
    text += fmt::format("{}stage {}: blocks {} ({:.1f} %)", stage == 0 ? "" : "; ", stage,
                        fmt::join(runs, ", "), 100 * share);
  }
  return text;
}

}  // namespace upmoe
