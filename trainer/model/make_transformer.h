#pragma once
// From named parameters and groups of ranks to layers.

#include <vector>

#include "configs/model_config.h"
#include "parallel/mesh.h"
#include "parallel/stage_plan.h"
#include "trainer/model/param_store.h"
#include "trainer/model/transformer.h"

namespace upmoe {

// Chunk `chunk` of `plan`.
Transformer make_transformer(const ModelConfig& config, const ParamStore& params, const ProcessMesh& mesh,
                             const StagePlan& plan, std::size_t chunk, Recompute recompute);
// All chunks of this rank's stage, first to last.
std::vector<Transformer> make_chunks(const ModelConfig& config, const ParamStore& params,
                                     const ProcessMesh& mesh, const StagePlan& plan, Recompute recompute);

}  // namespace upmoe
