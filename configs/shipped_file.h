#pragma once
// A file that the project ships, by its short name: qwen1.5-7b for configs/models/qwen1.5-7b.json.

#include <filesystem>
#include <string>
#include <vector>

namespace upmoe {

struct ShippedFolder {
  std::filesystem::path folder;
  std::string suffix;  // ".json"
  const char* what;    // "model", for messages
};

// Sorted; empty when there is no such folder.
std::vector<std::string> shipped_names(const ShippedFolder& shipped);

// `given` where it is a place on the disk or is written like one (with a slash or the suffix), else the file of that
// name. Throws Error(kUsage) that names the nearest and lists all.
std::filesystem::path shipped_or_own(const ShippedFolder& shipped, const std::string& given);

}  // namespace upmoe
