#include "configs/layer_choice.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>

#include "configs/schema_values.h"
#include "configs/yaml_reader.h"

namespace upmoe {
namespace {

using Kind = LayerChoice::Kind;

constexpr int kMostLayers = 10'000;
constexpr const char* kForms = "all, every:N, last:N, first_dense:N or a list of layers";
constexpr std::pair<Kind, const char*> kCounted[] = {
    {Kind::kEvery, "every"}, {Kind::kLast, "last"}, {Kind::kFirstDense, "first_dense"}};

bool becomes_mixture(const LayerChoice& choice, int layer, int layers) {
  switch (choice.kind) {
    case Kind::kAll:
      return true;
    case Kind::kEvery:
      return (layer + 1) % choice.count == 0;
    case Kind::kLast:
      return layer >= layers - choice.count;
    case Kind::kFirstDense:
      return layer >= choice.count;
    case Kind::kList:
      return std::binary_search(choice.layers.begin(), choice.layers.end(), layer);
  }
  fail(ExitCode::kFailure, "no such choice of layers");
}

void read_list(const YamlNode& node, const std::string& key, Problems& problems, LayerChoice& target) {
  LayerChoice choice{Kind::kList, 0, {}};
  for (const YamlNode& item : node.items)
    if (const auto layer = integer_of(item, key, {.least = 0, .most = kMostLayers}, problems))
      choice.layers.push_back(static_cast<int>(*layer));
  std::sort(choice.layers.begin(), choice.layers.end());
  const bool twice = std::adjacent_find(choice.layers.begin(), choice.layers.end()) != choice.layers.end();
  if (node.items.empty() || twice)
    problems.add(node.where,
                 fmt::format("{}: {}", key, twice ? "names a layer twice" : "found an empty list"));
  target = std::move(choice);
}

}  // namespace

void read_layer_choice(const YamlNode& node, const std::string& key, Problems& problems,
                       LayerChoice& target) {
  if (node.kind == YamlNode::Kind::kList) return read_list(node, key, problems, target);
  const auto text = text_of(node, key, {}, problems);
  if (!text) return;
  if (*text == "all") {
    target = {};
    return;
  }
  const std::size_t colon = text->find(':');
  const std::string form = text->substr(0, colon);
  for (const auto& [kind, name] : kCounted) {
    if (form != name || colon == std::string::npos) continue;
    YamlNode number;
    number.kind = YamlNode::Kind::kScalar;
    number.where = node.where;
    number.text = text->substr(colon + 1);
    if (const auto n = integer_of(number, key, {.least = 1, .most = kMostLayers}, problems))
      target = {kind, static_cast<int>(*n), {}};
    return;
  }
  problems.add(node.where, fmt::format("{}: found '{}', expected {}", key, *text, kForms));
}

std::string to_text(const LayerChoice& choice) {
  for (const auto& [kind, name] : kCounted)
    if (kind == choice.kind) return fmt::format("{}:{}", name, choice.count);
  return choice.kind == Kind::kAll ? "all" : fmt::format("[{}]", fmt::join(choice.layers, ", "));
}

std::string problem_of(const LayerChoice& choice, int layers) {
  const int highest = choice.kind == Kind::kList ? choice.layers.back() : choice.count - 1;
  const bool outside = choice.kind != Kind::kAll && choice.kind != Kind::kEvery && highest >= layers;
  if (outside) return fmt::format("{} reaches beyond the model's {} layers", to_text(choice), layers);
  if (static_cast<int>(dense_layers(choice, layers).size()) == layers)
    return fmt::format("{} leaves none of the model's {} layers to become a mixture", to_text(choice),
                       layers);
  return "";
}

std::vector<int> dense_layers(const LayerChoice& choice, int layers) {
  std::vector<int> dense;
  for (int layer = 0; layer < layers; ++layer)
    if (!becomes_mixture(choice, layer, layers)) dense.push_back(layer);
  return dense;
}

}  // namespace upmoe
