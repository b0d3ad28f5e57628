#include "data/hf_files.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <set>

#include "data/posix_file.h"
#include "kernels/core/log.h"

namespace upmoe {

namespace fs = std::filesystem;

namespace {

constexpr std::uint64_t kIndexLimit = std::uint64_t{64} << 20;
constexpr const char *kSingle = "model.safetensors", *kIndex = "model.safetensors.index.json";

// name -> file, from model.safetensors.index.json. Values must be plain names of files beside the index.
std::map<std::string, std::string> read_index(const fs::path& path) {
  std::map<std::string, std::string> map;
  std::set<std::string> seen;
  // Objects with equal keys silently keep the last one in this library; the callback sees each key as it comes.
  bool duplicate = false, in_map = false;
  const auto watch = [&](int depth, nlohmann::json::parse_event_t event, nlohmann::json& value) {
    if (event == nlohmann::json::parse_event_t::key) {
      if (depth == 1) in_map = value == "weight_map";
      if (depth == 2 && in_map) duplicate = duplicate || !seen.insert(value.get<std::string>()).second;
    }
    return depth < 8;
  };
  const nlohmann::json j = nlohmann::json::parse(read_text(path, kIndexLimit), watch, false);
  if (!j.is_object() || !j.contains("weight_map") || !j["weight_map"].is_object())
    fail(ExitCode::kBadInput, "{}: expected an object with 'weight_map'", path.string());
  if (duplicate) fail(ExitCode::kBadInput, "{}: a tensor stands in weight_map twice", path.string());
  for (const auto& [name, file] : j["weight_map"].items()) {
    const std::string text = file.is_string() ? file.get<std::string>() : std::string();
    const bool plain = file.is_string() && !text.empty() && text.find('/') == std::string::npos &&
                       text.find('\\') == std::string::npos && text.find('\0') == std::string::npos &&
                       text != "." && text != "..";
    if (!plain)
      fail(ExitCode::kBadInput, "{}: weight_map['{}'] is {}, expected the plain name of a file in {}",
           path.string(), name, file.dump(), path.parent_path().string());
    map[name] = text;
  }
  return map;
}

// Names of `dir` that end in `suffix`, in order; a few are enough.
std::vector<std::string> names_ending_in(const fs::path& dir, const std::string& suffix) {
  constexpr std::size_t kFew = 5;
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(dir)) {
    const std::string name = entry.path().filename().string();
    if (name.ends_with(suffix)) names.push_back(name);
  }
  std::sort(names.begin(), names.end());
  if (names.size() > kFew) names.resize(kFew);
  return names;
}

// Why a directory without either file has no weights for us, and the way out.
std::string cure(const fs::path& dir) {
  for (const char* name : {kSingle, kIndex})
    if (fs::is_symlink(fs::symlink_status(dir / name)))
      return fmt::format("{} is a link to {}, which is not there; fetch the model again", name,
                         fs::read_symlink(dir / name).string());
  const auto safetensors = names_ending_in(dir, ".safetensors");
  const bool shards = std::any_of(safetensors.begin(), safetensors.end(), [](const std::string& name) {
    return name.starts_with("model-") && name.find("-of-") != std::string::npos;
  });
  if (shards)
    return fmt::format("the shards {} are there without their index; fetch {} too",
                       fmt::join(safetensors, ", "), kIndex);
  for (const char* suffix : {".bin", ".pt", ".pth", ".gguf"}) {
    const auto names = names_ending_in(dir, suffix);
    if (names.empty()) continue;
    return fmt::format(
        "{} {} not read; convert the model once with transformers: python -c \"from transformers import "
        "AutoModelForCausalLM as M; M.from_pretrained('{}', dtype='auto').save_pretrained('CONVERTED')\"",
        fmt::join(names, ", "), names.size() == 1 ? "is" : "are", dir.string());
  }
  if (!safetensors.empty())
    return fmt::format("{} would have to be named {} to be read, here and by transformers",
                       fmt::join(safetensors, ", "), kSingle);
  return "fetch the weights";
}

void require_all(const fs::path& dir, const std::vector<std::string>& names) {
  std::vector<std::string> missing;
  for (const std::string& name : names)
    if (!fs::exists(dir / name)) missing.push_back(name);
  if (!missing.empty())
    fail(ExitCode::kBadInput, "{}: of {} files in the index, {} missing: {}; fetch the model again",
         dir.string(), names.size(), missing.size() == 1 ? "one is" : fmt::format("{} are", missing.size()),
         fmt::join(missing, ", "));
}

WeightFiles find_in(const fs::path& dir) {
  if (fs::exists(dir / "adapter_config.json"))
    fail(ExitCode::kBadInput,
         "{}: adapter_config.json is there, but adapters are not applied; merge the adapter into the weights "
         "(merge_and_unload of peft), or remove that file if they are merged already",
         dir.string());
  const bool index = fs::is_regular_file(dir / kIndex);
  if (fs::is_regular_file(dir / kSingle)) {
    if (index)
      log::info("{}: {} is used, as in transformers; the index beside it is left over", dir.string(),
                kSingle);
    return {{kSingle}, {}};
  }
  if (!index)
    fail(ExitCode::kBadInput, "{}: neither {} nor {} is there: {}", dir.string(), kSingle, kIndex, cure(dir));
  WeightFiles files;
  files.file_of = read_index(dir / kIndex);
  std::set<std::string> unique;
  for (const auto& [tensor, file] : files.file_of) unique.insert(file);
  files.names.assign(unique.begin(), unique.end());
  require_all(dir, files.names);
  return files;
}

}  // namespace

WeightFiles find_weight_files(const fs::path& dir) {
  return with_system_errors([&] { return find_in(dir); });
}

}  // namespace upmoe
