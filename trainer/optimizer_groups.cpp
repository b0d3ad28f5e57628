#include "trainer/optimizer_groups.h"

#include <fmt/format.h>

#include <algorithm>
#include <set>

#include "kernels/core/check.h"
#include "trainer/param_patterns.h"

namespace upmoe {

std::vector<Optimizer::Config::Group> optimizer_groups(const std::vector<OptimizerGroup>& groups,
                                                       const ModelConfig& config,
                                                       const std::vector<std::string>& frozen) {
  std::vector<Optimizer::Config::Group> all;
  std::set<std::string> taken;
  const std::set<std::string> resting(frozen.begin(), frozen.end());
  for (std::size_t g = 0; g < groups.size(); ++g) {
    const std::string key = fmt::format("optimizer.groups[{}]", g);
    Optimizer::Config::Group group{.names = {}, .weight_decay = groups[g].weight_decay};
    for (std::string& name : matched_params(groups[g].match, config, key))
      if (taken.insert(name).second) group.names.push_back(std::move(name));
    if (group.names.empty())
      fail(
          ExitCode::kUsage,
          "{}: all its parameters are in groups before it, of which the first one counts; put it before them",
          key);
    if (std::all_of(group.names.begin(), group.names.end(),
                    [&](const std::string& name) { return resting.contains(name); }))
      fail(ExitCode::kUsage,
           "{}: none of its parameters trains, '{}' for one is frozen; leave the group out, or have it match "
           "what trains",
           key, group.names.front());
    all.push_back(std::move(group));
  }
  return all;
}

}  // namespace upmoe
