#include "trainer/freeze.h"

#include <algorithm>

#include "configs/param_table.h"
#include "kernels/core/check.h"
#include "trainer/param_patterns.h"

namespace upmoe {

namespace {

// Beside adapters nothing trains.
std::vector<std::string> all_but_adapters(const ModelConfig& config) {
  std::vector<std::string> frozen;
  for (const ParamSpec& p : make_param_table(config))
    if (p.trained && !p.adapts) frozen.push_back(p.name);
  return frozen;
}

}  // namespace

std::vector<std::string> frozen_names(const std::vector<std::string>& patterns, const ModelConfig& config) {
  if (config.lora.given() && !patterns.empty())
    fail(ExitCode::kUsage, "freeze: the model has adapters, which train alone; leave freeze out");
  if (config.lora.given()) return all_but_adapters(config);
  if (patterns.empty()) return {};
  std::vector<std::string> frozen = matched_params(patterns, config, "freeze");
  const std::vector<ParamSpec> table = make_param_table(config);
  const auto parameters = static_cast<std::size_t>(
      std::count_if(table.begin(), table.end(), [](const ParamSpec& p) { return p.trained; }));
  if (frozen.size() == parameters)
    fail(ExitCode::kUsage, "freeze: all {} parameters would be frozen, and nothing would train", parameters);
  return frozen;
}

}  // namespace upmoe
