#include "configs/shipped_file.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <iterator>

#include "configs/nearest_name.h"
#include "kernels/core/check.h"

namespace upmoe {

namespace fs = std::filesystem;

std::vector<std::string> shipped_names(const ShippedFolder& shipped) {
  std::vector<std::string> names;
  std::error_code none;
  for (const fs::directory_entry& entry : fs::directory_iterator(shipped.folder, none))
    if (entry.path().extension() == shipped.suffix) names.push_back(entry.path().stem().string());
  std::sort(names.begin(), names.end());
  return names;
}

fs::path shipped_or_own(const ShippedFolder& shipped, const std::string& given) {
  const fs::path own(given);
  if (fs::exists(own) || given.find('/') != std::string::npos || own.extension() == shipped.suffix)
    return own;
  const std::vector<std::string> names = shipped_names(shipped);
  if (std::find(names.begin(), names.end(), given) != names.end())
    return shipped.folder / (given + shipped.suffix);
  if (names.empty())
    fail(ExitCode::kUsage, "no {} '{}': {} holds none; give a path", shipped.what, given,
         shipped.folder.string());
  // The only name that goes on as `given` ends is meant, however much of it is missing.
  std::vector<std::string> near;
  std::copy_if(names.begin(), names.end(), std::back_inserter(near),
               [&](const std::string& name) { return name.starts_with(given); });
  if (near.size() != 1) near = nearest_names(given, names);
  fail(ExitCode::kUsage, "no {} '{}'{}; the names are {}; or give a path", shipped.what, given,
       near.empty() ? "" : fmt::format("; did you mean '{}'?", near.front()), fmt::join(names, ", "));
}

}  // namespace upmoe
