#pragma once
// What this program was built with and found at its start.

#include <string>
#include <utility>
#include <vector>

namespace upmoe {

std::vector<std::pair<std::string, std::string>> library_versions();  // name and version, in words

}  // namespace upmoe
