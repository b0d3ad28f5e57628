#include "configs/model_folder.h"

#include <fmt/format.h>

#include <algorithm>
#include <system_error>
#include <vector>

namespace upmoe {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t kMostLooked = 1000;  // entries of one folder: this only finds words for a message

std::vector<fs::path> folders_in(const fs::path& dir) {
  std::vector<fs::path> found;
  std::error_code error;
  std::size_t looked = 0;
  for (fs::directory_iterator it(dir, error), end; !error && it != end && looked < kMostLooked;
       it.increment(error), ++looked) {
    std::error_code unreadable;
    if (it->is_directory(unreadable)) found.push_back(it->path());
  }
  std::sort(found.begin(), found.end());
  return found;
}

bool is_model(const fs::path& dir) {
  std::error_code error;
  return fs::exists(dir / "config.json", error);
}

// Model directories below: a snapshot of this cache folder, of one of the cache folders in it, or a child.
std::vector<fs::path> models_below(const fs::path& dir) {
  std::vector<fs::path> models;
  const auto take = [&](const fs::path& folder) {
    for (const fs::path& child : folders_in(folder))
      if (is_model(child)) models.push_back(child);
  };
  take(dir / "snapshots");
  take(dir);
  for (const fs::path& child : folders_in(dir))
    if (models.size() < 4 && child.filename().string().starts_with("models--")) take(child / "snapshots");
  return models;
}

// Where `folder` is no model but something beside one: what it is and what takes it.
std::string other_folder(const fs::path& folder) {
  std::error_code error;
  if (fs::exists(folder / "adapter_config.json", error))
    return "; it is an adapter as PEFT writes it, and not a model by itself: `upmoe export MODEL "
           "--merge-adapter " +
           folder.string() + "` makes one of it and its model";
  if (folder.filename() == "checkpoints")
    for (const fs::path& child : folders_in(folder))
      if (fs::exists(child / "manifest.json", error))
        return fmt::format(
            "; give its run's folder, {}, for the newest of the checkpoints in it, or one of them, {}",
            folder.has_parent_path() ? folder.parent_path().string() : ".", child.string());
  return "";
}

}  // namespace

std::string model_folder_hint(const fs::path& given) {
  std::error_code error;
  const fs::path path = given.string().ends_with('/') ? given.parent_path() : given;
  if (fs::is_regular_file(path, error)) {
    const fs::path parent = path.parent_path().empty() ? fs::path(".") : path.parent_path();
    return is_model(parent) ? fmt::format("; give its folder, {}", parent.string()) : other_folder(parent);
  }
  if (const std::string other = other_folder(path); !other.empty()) return other;
  const std::vector<fs::path> models = models_below(path);
  if (!models.empty()) {
    const bool cache = models.front().parent_path().filename() == "snapshots";
    std::string words = cache ? "; in the Hugging Face cache a model lies under snapshots/: give "
                              : "; a model lies in a folder of it: give ";
    for (std::size_t i = 0; i < std::min<std::size_t>(models.size(), 3); ++i)
      words += (i == 0 ? "" : " or ") + models[i].string();
    return words;
  }
  if (fs::is_directory(path / "snapshots", error))
    return "; it is a folder of the Hugging Face cache, and no complete snapshot lies in its snapshots/: "
           "download the model again";
  return "";
}

}  // namespace upmoe
