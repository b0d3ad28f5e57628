#include "data/model_source.h"

#include "configs/model_folder.h"
#include "data/checkpoint_folder.h"
#include "data/companions.h"
#include "data/crc.h"
#include "data/hf_model.h"
#include "data/run_metadata.h"
#include "data/shard_store.h"
#include "kernels/core/philox.h"
#include "kernels/core/system_error.h"

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
  bool has(const ParamSpec& param) const override { return !hf_tensors_of(config(), param).empty(); }
  fs::path directory() const override { return model_.dir(); }
  fs::path companions() const override { return model_.dir(); }

 private:
  HfModel model_;
};

// A checkpoint that upcycling made carries tokenizer files itself; those of training runs lie with the model
// that the run started from.
class CheckpointSource final : public ModelSource {
 public:
  explicit CheckpointSource(const fs::path& dir) : dir_(dir), store_(dir) {
    const RunMetadata run = run_metadata_of(store_);
    config_ = parse_model_config(run.model_config, (dir / "manifest.json").string());
    companions_ = !companions_in(dir).empty() ? dir : fs::path(run.source);
    if (!fs::is_directory(companions_)) companions_.clear();
  }
  const ModelConfig& config() const override { return config_; }
  void read(const ParamSpec& param, const Box& box, TensorView out) const override {
    if (has(param)) return store_.read_best(param.name, box, out);
    std::memset(out.data, 0, static_cast<std::size_t>(out.elements()) * size_of(out.dtype));  // it begins so
  }
  bool has(const ParamSpec& param) const override {
    return !param.added || store_.tensors().contains({param.name, "weight"});
  }
  fs::path directory() const override { return dir_; }
  fs::path companions() const override { return companions_; }

 private:
  fs::path dir_;
  ShardStore store_;
  ModelConfig config_;
  fs::path companions_;
};

// Elements of each tensor that the digest reads: enough to tell two models apart, little beside all of them.
constexpr std::int64_t kSampled = 1024;

}  // namespace

std::string function_of(const ModelConfig& config) {
  ModelConfig bare = config;
  bare.raw_json = "{}";
  bare.dtype = FileDType::kFp32;
  return to_hf_json(bare);
}

std::string function_without_routers(const ModelConfig& config) {
  ModelConfig bare = config;
  bare.router = {};
  bare.router_bias = bare.router_load = false;
  bare.lora = {};
  return function_of(bare);
}

std::string digest_of(const ModelSource& source) {
  std::string all = function_of(source.config());
  std::vector<float> values;
  for (const ParamSpec& p : make_param_table(source.config())) {
    if (!source.has(p)) continue;
    // Of an expert parameter each expert's first neuron, in one read; of others the first rows.
    Box box = whole(p.shape);
    if (p.expert) box.extent.dim[0] = 1;
    for (std::size_t d = p.expert ? 1 : 0; d < static_cast<std::size_t>(p.shape.rank); ++d) {
      const std::int64_t row = box.extent.elements() / box.extent.dim[d];
      box.extent.dim[d] = std::min(box.extent.dim[d], std::max<std::int64_t>(1, kSampled / row));
    }
    const auto part = static_cast<std::size_t>(box.extent.elements());
    if (p.expert) box.extent.dim[0] = p.shape[0];
    values.resize(static_cast<std::size_t>(box.extent.elements()));
    source.read(p, box, host_view(values.data(), box.extent));
    for (std::size_t at = 0; at < values.size(); at += part)
      all += fmt::format(" {} {:08x}", p.name, crc32c(values.data() + at, part * sizeof(float)));
  }
  return fmt::format("{:016x}{:016x}", philox_key(2, all), philox_key(3, all));
}

namespace {

std::unique_ptr<ModelSource> open_directory(const fs::path& given) {
  const fs::path path = newest_if_run(given);
  if (!fs::is_directory(path))
    fail(ExitCode::kBadInput, "{}: {}, expected a model directory or a checkpoint{}", path.string(),
         fs::exists(path) ? "a file" : "does not exist", model_folder_hint(path));
  if (fs::exists(path / "manifest.json")) return std::make_unique<CheckpointSource>(path);
  if (fs::exists(path / "config.json")) return std::make_unique<HfSource>(path);
  fail(
      ExitCode::kBadInput,
      "{}: holds no config.json, manifest.json or checkpoints/: neither a model directory nor a checkpoint{}",
      path.string(), model_folder_hint(path));
}

}  // namespace

std::unique_ptr<ModelSource> open_model(const fs::path& path) {
  return with_system_errors([&] { return open_directory(path); });
}

ModelConfig config_of_model(const fs::path& path) {
  return with_system_errors([&] {
    const bool described = !fs::is_directory(path) || fs::exists(path / "config.json");
    return described ? read_model_config(path) : open_directory(path)->config();
  });
}

}  // namespace upmoe
