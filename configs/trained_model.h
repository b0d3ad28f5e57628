#pragma once
// The model that a run trains: the one that it begins with, and what its keys add.

#include "configs/model_config.h"
#include "configs/run_config.h"

namespace upmoe {

// `source` with the routers (router_record.h) and the adapters (lora_record.h) that the run asks for. What cannot be
// together is for problems_of (run_problems.h) to say.
ModelConfig trained_model(const RunConfig& run, ModelConfig source);

}  // namespace upmoe
