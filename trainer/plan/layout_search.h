#pragma once
// Which layouts of a run are the fastest on so many ranks of a machine: meshes, ZeRO, micro-batch and recomputation.
//
// Every mesh is looked at that the run allows and that is not cut up without need (Excluded). Each is planned once; of
// the fastest ones every micro-batch and ZeRO stage, with the first policy of recomputation that fits. How much is
// planned is bounded by what plans go through, not by a clock, so that equal questions have equal answers. What the run
// says of zero, pp_chunks and node_ranks is set aside (LayoutSearch::kZero and so on); its other keys hold.

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "trainer/plan/run_plan.h"

namespace upmoe {

struct FoundLayout {
  RunConfig::Parallel parallel;
  std::int64_t micro_batch = 0;
  Recompute recompute = Recompute::kNone;
  double seconds = 0, tokens_per_s = 0, mfu = 0, bytes = 0;
  std::int64_t ranks_without_experts = 0;  // of ep's
};

struct LayoutSearch {
  // Of every layout, whatever the run says.
  static constexpr std::array<int, 2> kZero{1, 2};
  static constexpr int kChunks = 1, kNodeRanks = 0;

  std::vector<FoundLayout> best;     // the fastest first, at most ten
  std::int64_t meshes = 0;           // of so many ranks
  struct Excluded {                  // of the meshes, why
    std::int64_t impossible = 0;     // the run's sizes do not allow it
    std::int64_t across_nodes = 0;   // tp above the ranks of a node
    std::int64_t short_context = 0;  // cp for sequences of less than 8192 tokens a rank
    std::int64_t cut_experts = 0;    // etp, where twice as many ranks could have whole experts
    std::int64_t idle_ranks = 0;     // some of ep's ranks have no expert; looked at where no other mesh fits
    std::int64_t not_reached = 0;    // like those that were planned, with which the time for it was spent
    std::int64_t too_large = 0;      // do not fit, recomputing everything, with one sequence
    std::int64_t slower = 0;         // fit, and are slower than those that were planned further
  } excluded;
  std::int64_t plans = 0;   // rehearsed
  double device_bytes = 0;  // that a rank has
  // Of what does not fit, the smallest that was planned, the fullest rank's; 0: none.
  double least_bytes = 0;
  std::vector<std::string> savings;  // keys of the run with which every layout would be smaller, as overrides
};

LayoutSearch search_layouts(const RunConfig& run, const ModelConfig& model, int world,
                            const Machine& machine);

}  // namespace upmoe
