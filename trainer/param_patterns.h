#pragma once
// Parameters as configurations name them.

#include <string>
#include <vector>

#include "configs/model_config.h"

namespace upmoe {

// The trained parameters, by our names and in the order of the table, that patterns catch: shell patterns over our
// names or Hugging Face's, and presets:
//
//   @experts    the routed experts' weights
//   @router     routers, and the noise that one learns
//   @attention  queries, keys, values, their biases and norms, and the output
//   @shared     shared experts and their gates
//   @non_experts, @non_router, @non_attention, @non_shared   everything else that trains
//
// One of our parameters may hold several of Hugging Face's tensors (all experts' gates and ups): it is caught when the
// patterns together match all of those. `key`: of the configuration, for messages. Throws Error(kUsage) for a pattern
// that matches nothing, with the nearest names, and for one that matches a part of a parameter.
std::vector<std::string> matched_params(const std::vector<std::string>& patterns, const ModelConfig& config,
                                        const std::string& key);

}  // namespace upmoe
