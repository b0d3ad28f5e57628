#pragma once
// What the parts of a model cost, from the ledger: each kind of block, the embedding and the head run once,
// forward and backward, on the dry device.

#include "configs/model_config.h"
#include "configs/run_config.h"
#include "parallel/stage_plan.h"

namespace upmoe {

// Blocks to stages by the cost that the ledger books for one sequence on the dry device.
StagePlan stages_of(const RunConfig& run, const ModelConfig& model);

}  // namespace upmoe
