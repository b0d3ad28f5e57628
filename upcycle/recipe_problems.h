#pragma once
// What can be wrong between a recipe and a dense model.

#include <string>
#include <vector>

#include "configs/model_config.h"
#include "configs/upcycle_config.h"

namespace upmoe {

// Everything that keeps this recipe from fitting this dense model, one sentence each; empty when it fits.
std::vector<std::string> problems_of(const UpcycleConfig& config, const ModelConfig& dense, int sources = 1);

}  // namespace upmoe
