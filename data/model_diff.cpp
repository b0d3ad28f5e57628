#include "data/model_diff.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <map>

namespace upmoe {

namespace {

std::vector<float> values_of(const ModelSource& model, const ParamSpec& p) {
  std::vector<float> values(static_cast<std::size_t>(p.shape.elements()));
  model.read(p, whole(p.shape), host_view(values.data(), p.shape));
  return values;
}

std::optional<ParamDifference> value_difference(const ModelSource& first, const ModelSource& second,
                                                const ParamSpec& p) {
  const std::vector<float> x = values_of(first, p), y = values_of(second, p);
  ParamDifference found;
  found.name = p.name;
  double squares = 0, norm = 0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    if (!std::isfinite(x[i]) || !std::isfinite(y[i])) {
      if (std::bit_cast<std::uint32_t>(x[i]) != std::bit_cast<std::uint32_t>(y[i])) ++found.not_finite;
      continue;
    }
    const double d = double(y[i]) - double(x[i]);
    found.max_abs = std::max(found.max_abs, std::abs(d));
    squares += d * d;
    norm += double(x[i]) * double(x[i]);
  }
  if (found.max_abs == 0 && found.not_finite == 0) return std::nullopt;
  if (norm > 0) found.relative_l2 = std::sqrt(squares / norm);
  return found;
}

}  // namespace

std::vector<ParamDifference> differences(const ModelSource& first, const ModelSource& second) {
  using Kind = ParamDifference::Kind;
  std::map<std::string, ParamSpec> others;
  for (const ParamSpec& p : make_param_table(second.config()))
    if (second.has(p)) others.emplace(p.name, p);
  std::vector<ParamDifference> all;
  for (const ParamSpec& p : make_param_table(first.config())) {
    if (!first.has(p)) continue;
    const auto other = others.find(p.name);
    if (other == others.end()) {
      all.push_back({.name = p.name, .kind = Kind::kOnlyInFirst});
      continue;
    }
    if (!(other->second.shape == p.shape)) {
      all.push_back({.name = p.name, .kind = Kind::kShape, .first = p.shape, .second = other->second.shape});
    } else if (auto found = value_difference(first, second, p)) {
      all.push_back(std::move(*found));
    }
    others.erase(other);
  }
  for (const auto& [name, p] : others) all.push_back({.name = name, .kind = Kind::kOnlyInSecond});
  return all;
}

}  // namespace upmoe
