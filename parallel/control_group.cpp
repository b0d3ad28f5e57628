#include "parallel/control_group.h"

#include <sstream>

namespace upmoe {

std::vector<std::filesystem::path> control_groups(const std::string& root, const std::string& own,
                                                  const std::string& controller) {
  std::vector<std::filesystem::path> groups;
  std::istringstream lines(own);  // "0::/path" of version 2, "4:cpu,cpuacct:/path" of version 1
  for (std::string line; std::getline(lines, line);) {
    const std::size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    if (!controllers.empty() && ("," + controllers + ",").find("," + controller + ",") == std::string::npos)
      continue;
    const std::filesystem::path mount = std::filesystem::path(root) / controllers;
    // In a container the path may be that of the host, which is not mounted: its own group is the root then.
    for (std::filesystem::path at = line.substr(second + 1); at.has_relative_path(); at = at.parent_path())
      groups.push_back(mount / at.relative_path());
    groups.push_back(mount);
  }
  return groups;
}

}  // namespace upmoe
