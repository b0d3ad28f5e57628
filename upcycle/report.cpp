#include "upcycle/report.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

namespace upmoe {

namespace {

using Json = nlohmann::ordered_json;

Json source_json(const SourceSurvey& survey) {
  Json json = {{"digest", "crc32c of each whole file"}, {"files", Json::array()}};
  for (const SourceSurvey::File& file : survey.files) {
    json["files"].push_back(
        {{"name", file.name}, {"bytes", file.bytes}, {"crc32c", fmt::format("{:08x}", file.crc32c)}});
  }
  json["all_zero_matrices"] = survey.all_zero;
  return json;
}

// The last ones depend on the processor's vectors.
double six_digits(double value) {
  return std::stod(fmt::format("{:.6g}", value));
}

CopyCounts count_copies(const Recipe& recipe, const Recipe::Layer& layer, const ModelConfig& dense,
                        const PermutationCache& permutations) {
  if (recipe.copies_of_experts > 0) return {recipe.copies_of_experts, recipe.copies_of_experts};
  std::vector<std::int64_t> copies(static_cast<std::size_t>(dense.intermediate_size), 0);
  for (const auto& lines : layer.experts) {
    const auto& line =
        recipe.lines[static_cast<std::size_t>(lines[static_cast<std::size_t>(FfnMatrix::kGate)])];
    const UnitMap& map = std::get<ExpertMatrix>(line.transform).map;
    for (std::int64_t j = 0; j < map.width; ++j) {
      const std::int32_t source = map.source_of(j, permutations);
      // Before any redraw, and of the gates alone: up and down have the same map.
      if (source >= 0) ++copies[static_cast<std::size_t>(source)];
    }
  }
  const auto [min, max] = std::minmax_element(copies.begin(), copies.end());
  return {*min, *max};
}

}  // namespace

std::vector<LayerReport> layer_reports(const Recipe& recipe, const std::vector<double>& errors,
                                       const ModelConfig& dense, const PermutationCache& permutations) {
  std::vector<LayerReport> reports;
  for (std::size_t i = 0; i < recipe.layers.size(); ++i) {
    const Recipe::Layer& layer = recipe.layers[i];
    if (layer.router < 0) continue;  // stays dense
    reports.push_back({static_cast<int>(i), errors.at(i), count_copies(recipe, layer, dense, permutations)});
  }
  return reports;
}

double largest_error(const std::vector<LayerReport>& layers) {
  double worst = 0;
  for (const LayerReport& layer : layers) worst = std::max(worst, layer.relative_error);
  return worst;
}

std::string make_report(const UpcycleConfig& config, const Recipe& recipe, const SourceSet& sources,
                        const std::vector<LayerReport>& layers, int error_tokens,
                        const std::optional<StepZero>& step_zero) {
  Json report;
  report["format"] = "upmoe-upcycle-report-1";
  report["recipe"] = to_yaml(config);
  report["seed"] = config.seed;
  report["source"] = source_json(sources.survey_of(0));
  for (int i = 1; i < sources.size(); ++i)
    report["further_sources"].push_back(source_json(sources.survey_of(i)));
  report["relative_error"] = fmt::format(
      "||MoE(x) - {0}(x)|| / ||{0}(x)|| of a layer over {1} random inputs (unit normal, RMS norm, norm "
      "weight){2}",
      recipe.copies_of_experts > 0 ? "source" : "FFN", error_tokens,
      sources.size() > 1 ? "; FFN and norm weight of the first source" : "");
  report["layers"] = Json::array();
  for (const LayerReport& layer : layers) {
    report["layers"].push_back({{"layer", layer.layer},
                                {"relative_error", six_digits(layer.relative_error)},
                                {"copies_min", layer.copies.min},
                                {"copies_max", layer.copies.max},
                                {"redrawn_neurons_per_expert", recipe.redrawn},
                                {"redrawn_neurons", recipe.redrawn * config.target.num_experts},
                                {"scale", recipe.scale}});
  }
  if (largest_error(layers) > kErrorOfNothing)
    report["remark"] =
        "errors above 1: those layers begin further from what they were made of than a layer of zeros would";
  if (step_zero)
    report["step_zero"] = {{"tokens", step_zero->tokens},
                           {"seq_len", step_zero->seq_len},
                           {"loss", six_digits(step_zero->loss)},
                           {"source_loss", six_digits(step_zero->source_loss)},
                           {"kl_source_mixture", six_digits(step_zero->divergence)}};
  return report.dump(2) + "\n";
}

}  // namespace upmoe
