#pragma once
// What the operating system refused, in the words of an Error.

#include <filesystem>
#include <string>

namespace upmoe {

inline std::string refused_by_system(const std::filesystem::filesystem_error& e) {
  return e.path1().string() + ": " + e.code().message() + "; check the path and its permissions";
}

}  // namespace upmoe
