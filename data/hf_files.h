#pragma once
// Which files of a model directory hold its weights.

#include <filesystem>
#include <map>
#include <string>
#include <vector>

namespace upmoe {

struct WeightFiles {
  std::vector<std::string> names;              // plain names of files in the directory, each of them there
  std::map<std::string, std::string> file_of;  // tensor -> file as the index says it; empty without index
};

// The choice of transformers: model.safetensors, else the files that model.safetensors.index.json names.
// Throws Error(kBadInput) that says what is there instead and what to do about it.
WeightFiles find_weight_files(const std::filesystem::path& dir);

}  // namespace upmoe
