#pragma once
// Which parameters the groups of a configuration hold.

#include <vector>

#include "configs/run_config.h"
#include "trainer/optimizer.h"

namespace upmoe {

// A parameter is in the first group whose patterns (param_patterns.h) catch it. Throws Error(kUsage) for patterns as
// matched_params() does, and for a group whose parameters are all in groups before it, or all among the `frozen` ones
// (freeze.h): its rate would be nobody's.
std::vector<Optimizer::Config::Group> optimizer_groups(const std::vector<OptimizerGroup>& groups,
                                                       const ModelConfig& config,
                                                       const std::vector<std::string>& frozen = {});

}  // namespace upmoe
