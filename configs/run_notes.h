#pragma once
// What a run configuration asks for in vain: said, not refused, because a key may wait for another
// value of its neighbour.

#include <string>
#include <vector>

#include "configs/model_config.h"
#include "configs/run_config.h"

namespace upmoe {

// Keys that were changed from their defaults and have no effect beside the others, one sentence each; with
// the model, those that depend on it alone.
std::vector<std::string> without_effect(const RunConfig& run);
std::vector<std::string> without_effect(const RunConfig& run, const ModelConfig& model);
// How many of ep's ranks hold no routed expert of the model, and of a teacher that is a mixture: a sentence for each of
// the two of which there are such. without_effect(run, model) says them as well.
std::vector<std::string> words_of_ranks_without_experts(const RunConfig& run, const ModelConfig& model);

}  // namespace upmoe
