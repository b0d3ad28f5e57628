#pragma once
// The control groups that this process is in: where the limits of a container stand.

#include <filesystem>
#include <string>
#include <vector>

namespace upmoe {

// The folders that may hold limits of `controller` ("cpu", "memory"), this process's own group and those around
// it, version 1 and 2. `root` is where they are mounted, `own` the text of /proc/self/cgroup. Some may not exist.
std::vector<std::filesystem::path> control_groups(const std::string& root, const std::string& own,
                                                  const std::string& controller);

}  // namespace upmoe
