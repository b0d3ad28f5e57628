#pragma once
// Which parameters do not train.

#include <string>
#include <vector>

#include "configs/model_config.h"

namespace upmoe {

// The parameters, by our names, that `freeze` names (param_patterns.h); of a model with adapters, which asks for no
// patterns, all but those. Throws Error(kUsage) as matched_params() does,
// and when nothing would be left to train.
std::vector<std::string> frozen_names(const std::vector<std::string>& patterns, const ModelConfig& config);

}  // namespace upmoe
