#pragma once
// Blocks to pipeline stages by what they cost.

#include "configs/run_config.h"
#include "parallel/stage_plan.h"

namespace upmoe {

// By the FLOPs that the ledger books for one sequence, forward and backward, on the dry device; the head counts.
StagePlan stages_of(const RunConfig& run, const ModelConfig& model);

}  // namespace upmoe
