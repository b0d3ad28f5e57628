#include "launch/shipped.h"

#include <algorithm>

namespace upmoe {

namespace fs = std::filesystem;

const ShippedFolder kMachines{fs::path(UPMOE_SOURCE_DIR) / "configs" / "machines", ".yaml", "machine"};
const ShippedFolder kModels{fs::path(UPMOE_SOURCE_DIR) / "configs" / "models", ".json", "model"};

namespace {

// What holds weights, here or in a form that is not read: whoever opens it says what is to be done about those.
bool holds_weights(const fs::path& directory) {
  const std::string suffixes[] = {".safetensors", ".bin", ".pt", ".pth", ".gguf"};
  for (const fs::directory_entry& entry : fs::directory_iterator(directory))
    if (std::find(std::begin(suffixes), std::end(suffixes), entry.path().extension()) != std::end(suffixes))
      return true;
  return fs::exists(directory / "manifest.json") || fs::exists(directory / "model.safetensors.index.json");
}

}  // namespace

ModelConfig shape_of_model(const std::string& given) {
  return config_of_model(shipped_or_own(kModels, given));
}

std::unique_ptr<ModelSource> weights_of_model(const std::string& given) {
  const fs::path path = shipped_or_own(kModels, given);
  if (fs::is_regular_file(path)) return nullptr;
  if (fs::is_directory(path) && fs::exists(path / "config.json") && !holds_weights(path)) return nullptr;
  return open_model(path);
}

std::string name_of_model(const std::string& given) {
  const fs::path path = fs::path(given).lexically_normal();
  if (path.filename() == "config.json" && path.has_parent_path())
    return path.parent_path().filename().string();
  if (!path.has_filename()) return path.parent_path().filename().string();
  return path.extension() == kModels.suffix ? path.stem().string() : path.filename().string();
}

}  // namespace upmoe
