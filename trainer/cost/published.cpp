#include "trainer/cost/published.h"

#include <fmt/ranges.h>

#include <cmath>
#include <cstdlib>
#include <vector>

#include "kernels/core/check.h"

namespace upmoe {

namespace {

constexpr PublishedModel kPublished[] = {
    {"mistral-7b", "Mistral-7B", true, {"7.2", "7.2", "7.0"}},
    {"qwen1.5-7b", "Qwen1.5-7B", true, {"7.7", "7.7", "6.4"}, "the announcement's text says 6.5"},
    {"gemma-7b", "Gemma-7B", true, {"8.5", "7.8", "7.8"}},
    {"deepseek-moe-16b", "DeepSeekMoE-16B", true, {"16.4", "2.8", "2.4"}},
    {"qwen1.5-moe-a2.7b", "Qwen1.5-MoE-A2.7B", true, {"14.3", "2.7", "2.0"}},
    {"qwen1.5-1.8b", "Qwen1.5-1.8B", false, {}, "its dense source"},
    {"qwen1.5-32b", "Qwen1.5-32B", false, {}},
    {"mixtral-8x7b", "Mixtral-8x7B", false, {"46.7", "12.9", ""}},
    {"mixtral-8x22b", "Mixtral-8x22B", false, {"141", "39", ""}},
    {"dbrx", "DBRX", false, {"132", "36", ""}},
    {"dots.llm1", "dots.llm1", false, {"142", "14", ""}},
    {"qwen2-57b-a14b", "Qwen2-57B-A14B", false, {"57.4", "14", ""}},
    {"qwen3-30b-a3b", "Qwen3-30B-A3B", false, {"30.5", "3.3", ""}},
    {"qwen3-0.6b", "Qwen3-0.6B", false, {"0.6", "", "0.44"}},
    {"marco-nano", "Marco-Nano", false, {"8", "0.6", ""}},
};

struct Decimal {
  double value;
  double scale;  // 10 to the number of decimals
};

Decimal read(const std::string& printed) {
  const std::size_t point = printed.find('.');
  const std::size_t decimals = point == std::string::npos ? 0 : printed.size() - point - 1;
  return {std::strtod(printed.c_str(), nullptr), std::pow(10.0, static_cast<double>(decimals))};
}

}  // namespace

std::span<const PublishedModel> published_models() {
  return kPublished;
}

const PublishedModel& published_model(std::string_view file) {
  for (const PublishedModel& m : kPublished)
    if (file == m.file) return m;
  fail(ExitCode::kFailure, "nothing is known of a model '{}'", file);
}

Agreement agreement(const std::string& printed, double billions) {
  if (printed.empty()) return Agreement::kNothingPrinted;
  const Decimal p = read(printed);
  const double found = std::round(p.value * p.scale);
  if (std::round(billions * p.scale) == found) return Agreement::kRounded;
  return std::floor(billions * p.scale) == found ? Agreement::kCut : Agreement::kDiffers;
}

std::string remark(const PublishedModel& model, const ParamCounts& computed) {
  const auto billions = [](std::int64_t n) { return static_cast<double>(n) * 1e-9; };
  const double non_embedding = billions(computed.activated_non_embedding);
  struct Cell {
    const char* name;
    std::string printed;
    double value;
  };
  const Cell cells[] = {{"total", model.cells.total, billions(computed.total)},
                        {"activated", model.cells.activated, billions(computed.activated)},
                        {"non-embedding", model.cells.activated_non_embedding, non_embedding}};
  std::vector<std::string> words;
  bool any = false;
  for (const Cell& c : cells) {
    const Agreement how = agreement(c.printed, c.value);
    any = any || how != Agreement::kNothingPrinted;
    if (how == Agreement::kCut)
      words.push_back(fmt::format("{} cut, not rounded", c.name));
    else if (how == Agreement::kDiffers && agreement(c.printed, non_embedding) == Agreement::kRounded)
      words.push_back(fmt::format("{} leaves out the embedding, which other rows count", c.name));
    else if (how == Agreement::kDiffers)
      words.push_back(fmt::format("{} differs by {:+.2f}", c.name, read(c.printed).value - c.value));
  }
  if (any && words.empty()) words.emplace_back("agrees");
  if (*model.note != 0) words.emplace_back(model.note);
  return fmt::format("{}", fmt::join(words, "; "));
}

}  // namespace upmoe
