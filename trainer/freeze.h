#pragma once
// Which parameters do not train.

#include <string>
#include <vector>

#include "configs/model_config.h"

namespace upmoe {

// The parameters, by our names, that shell patterns over our names or Hugging Face's freeze. One of ours may
// hold several of Hugging Face's (all experts' gates and ups): it is frozen when the patterns together match
// all of those. Throws Error(kUsage) for a pattern that matches nothing, with the nearest names; for one that
// would freeze a part of a parameter; and when nothing would be left to train.
std::vector<std::string> frozen_names(const std::vector<std::string>& patterns, const ModelConfig& config);

}  // namespace upmoe
