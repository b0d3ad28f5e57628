#pragma once
// upcycle_report.json: what a mixture was made of, and how near to its source it starts.

#include <string>
#include <vector>

#include "configs/upcycle_config.h"
#include "upcycle/recipe.h"
#include "upcycle/source_survey.h"

namespace upmoe {

struct CopyCounts {
  std::int64_t min = 0, max = 0;  // over source neurons
};
// How often the routed experts of a layer hold each source neuron, before any redraw.
CopyCounts count_copies(const Recipe& recipe, int layer, const ModelConfig& dense,
                        const PermutationCache& permutations);

struct LayerReport {
  double relative_error = 0;
  CopyCounts copies;
};

// `config` as resolved. The text depends on what was asked for alone, not on ranks, paths or time.
std::string make_report(const UpcycleConfig& config, const Recipe& recipe, const SourceSurvey& survey,
                        const std::vector<LayerReport>& layers, int error_tokens);

}  // namespace upmoe
