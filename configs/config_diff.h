#pragma once
// What differs between the configuration that a checkpoint was written under and the one that was asked for.

#include <string>
#include <vector>

#include "configs/run_config.h"

namespace upmoe {

struct ConfigChange {
  std::string key, before, after;  // values as to_yaml writes them
  std::string str() const { return key + ": " + before + " -> " + after; }
};

// The configuration kept in a checkpoint (to_yaml of an earlier run, perhaps by an earlier program). Keys
// that it lacks have their defaults; keys that this program does not read are left out. Never throws.
RunConfig recorded_run_config(const std::string& yaml);
// Key by key, in the order of the file.
std::vector<ConfigChange> changes_between(const RunConfig& before, const RunConfig& after);

}  // namespace upmoe
