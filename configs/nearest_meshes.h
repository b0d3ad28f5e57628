#pragma once
// What a run that is not possible could be instead.

#include <string>
#include <vector>

#include "configs/model_config.h"
#include "configs/run_config.h"

namespace upmoe {

// Up to `most` meshes of world_size ranks that this run and model allow, those nearest to the run's first (an
// axis doubled or halved is one step); empty when no mesh near it helps. Of ep's ranks every one has an expert in them.
std::vector<std::string> nearest_meshes(const RunConfig& run, const ModelConfig& model, int world_size,
                                        std::size_t most = 3);
// Throws Error(kUsage) with everything that makes the run impossible for so many ranks, and the nearest meshes that
// are possible.
void require_possible(const RunConfig& run, const ModelConfig& model, int world_size);

}  // namespace upmoe
