#pragma once
// The routers' buffers: what a step leaves for the next one, from the assignments of the whole step over all ranks.
// They are whole numbers, so every rank that holds a buffer changes it alike, whatever the layout. assigned: per
// mixture of the whole model and expert. Models without such a buffer are left alone.

#include "kernels/core/exec.h"
#include "trainer/model/param_store.h"

namespace upmoe {

// Balancing without a loss (arXiv 2408.15664): bias_E += rate * sign(mean - assigned_E).
void update_router_biases(Exec& ex, const ParamStore& params, const ModelConfig& config,
                          const std::vector<std::vector<double>>& assigned, double rate);

// load_E = assigned_E over their sum, for the balance term of kind `global`.
void update_router_loads(Exec& ex, const ParamStore& params, const ModelConfig& config,
                         const std::vector<std::vector<double>>& assigned);
// Of every block, as they lie in its buffer; absent where it is none of this rank's mixtures.
std::vector<ConstTensorView> router_loads(const ParamStore& params, const ModelConfig& config);

}  // namespace upmoe
