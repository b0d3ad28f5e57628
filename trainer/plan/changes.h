#pragma once
// What would make a run fit, or faster: keys changed one at a time, each planned like the run itself.

#include <string>
#include <vector>

#include "trainer/plan/run_plan.h"

namespace upmoe {

struct Change {
  std::string keys;    // "train.recompute=swiglu", as the command line takes them
  double bytes = 0;    // of the fullest rank, then
  double seconds = 0;  // of a step
  bool fits = false;
  std::int64_t ranks_without_experts = 0;  // of ep's, then
};

// Of the changes that are possible: where the run does not fit, those that make it smaller, those first that fit, the
// fastest before others; where it does, those that fit and are faster, the fastest first. One that leaves more ranks
// without experts is among them only where no other makes the run fit.
std::vector<Change> helpful_changes(const RunConfig& run, const ModelConfig& model, const RunPlan& plan,
                                    const Machine& machine);

}  // namespace upmoe
