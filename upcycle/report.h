#pragma once
// upcycle_report.json: what a mixture was made of, and how near to its source it starts.

#include <optional>
#include <string>
#include <vector>

#include "configs/upcycle_config.h"
#include "upcycle/recipe.h"
#include "upcycle/source_set.h"

namespace upmoe {

struct CopyCounts {
  std::int64_t min = 0, max = 0;  // over source neurons
};
// What the mixture and its source (the first one) predict on real tokens.
struct StepZero {
  double loss = 0, source_loss = 0;  // mean cross-entropy per token, in nats
  double divergence = 0;             // mean of KL(source || mixture), in nats
  std::int64_t tokens = 0, seq_len = 0;
};
struct LayerReport {
  int layer = 0;
  double relative_error = 0;
  CopyCounts copies;  // how often the routed experts hold each source neuron, before any redraw
};
// Of the layers that become mixtures; errors: of all layers, layer_error().
std::vector<LayerReport> layer_reports(const Recipe& recipe, const std::vector<double>& errors,
                                       const ModelConfig& dense, const PermutationCache& permutations);

// `config` as resolved. The text depends on what was asked for alone, not on ranks, paths or time.
std::string make_report(const UpcycleConfig& config, const Recipe& recipe, const SourceSet& sources,
                        const std::vector<LayerReport>& layers, int error_tokens,
                        const std::optional<StepZero>& step_zero);
// The largest error of a layer, 0 without any. Above 1 the layer is further from what it was made of than one that
// computes nothing: reports and messages say so.
double largest_error(const std::vector<LayerReport>& layers);
inline constexpr double kErrorOfNothing = 1.0;

}  // namespace upmoe
