#include "data/model_source.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "data/checkpoint_folder.h"
#include "data/hf_model.h"
#include "data/shard_store.h"

namespace upmoe {

namespace fs = std::filesystem;

namespace {

class HfSource final : public ModelSource {
 public:
  explicit HfSource(const fs::path& dir) : model_(dir) {}
  const ModelConfig& config() const override { return model_.config(); }
  void read(const ParamSpec& param, const Box& box, TensorView out) const override {
    model_.read(param, box, out);
  }
  fs::path companions() const override { return model_.dir(); }

 private:
  HfModel model_;
};

// A checkpoint that upcycling made carries tokenizer files itself; those of training runs lie with the model
// that the run started from.
bool has_companions(const fs::path& dir) {
  const auto& names = companion_files();
  return std::any_of(names.begin(), names.end(),
                     [&](const std::string& name) { return fs::exists(dir / name); });
}

class CheckpointSource final : public ModelSource {
 public:
  explicit CheckpointSource(const fs::path& dir) : store_(dir) {
    const std::string where = (dir / "manifest.json").string();
    try {
      const auto run = nlohmann::json::parse(store_.metadata_json());
      config_ = parse_model_config(run.at("model_config").get<std::string>(), where);
      companions_ = has_companions(dir) ? dir : fs::path(run.at("source").get<std::string>());
    } catch (const nlohmann::json::exception& e) {
      fail(ExitCode::kBadInput, "{}: not the checkpoint of a training run: {}", where, e.what());
    }
    if (!fs::is_directory(companions_)) companions_.clear();
  }
  const ModelConfig& config() const override { return config_; }
  void read(const ParamSpec& param, const Box& box, TensorView out) const override {
    store_.read_best(param.name, box, out);
  }
  fs::path companions() const override { return companions_; }

 private:
  ShardStore store_;
  ModelConfig config_;
  fs::path companions_;
};

}  // namespace

std::unique_ptr<ModelSource> open_model(const fs::path& path) {
  if (!fs::is_directory(path))
    fail(ExitCode::kBadInput, "{}: {}, expected a model directory or a checkpoint", path.string(),
         fs::exists(path) ? "a file" : "does not exist");
  if (fs::exists(path / "manifest.json")) return std::make_unique<CheckpointSource>(path);
  if (fs::is_directory(path / "checkpoints"))
    return std::make_unique<CheckpointSource>(newest_checkpoint(path));
  if (fs::exists(path / "config.json")) return std::make_unique<HfSource>(path);
  fail(ExitCode::kBadInput,
       "{}: holds no config.json, manifest.json or checkpoints/: neither a model directory nor a checkpoint",
       path.string());
}

}  // namespace upmoe
