#include "configs/config_diff.h"

#include "configs/run_schema.h"

namespace upmoe {

RunConfig recorded_run_config(const std::string& yaml) {
  RunConfig run;
  Problems ignored;  // the checkpoint was good for its program
  Schema schema = run_schema(run);
  schema.read(parse_yaml(yaml, "checkpoint", ignored), ignored);
  return run;
}

std::vector<ConfigChange> changes_between(const RunConfig& before, const RunConfig& after) {
  RunConfig one = before, two = after;
  const auto was = run_schema(one).values(), is = run_schema(two).values();
  std::vector<ConfigChange> changes;
  for (std::size_t i = 0; i < is.size(); ++i)
    if (was[i].second != is[i].second) changes.push_back({is[i].first, was[i].second, is[i].second});
  return changes;
}

}  // namespace upmoe
