#include "data/hf_writer.h"

#include <nlohmann/json.hpp>

#include "data/companions.h"
#include "data/folder.h"
#include "data/hf_names.h"
#include "data/posix_file.h"
#include "data/staged_directory.h"
#include "parallel/watchdog.h"

namespace upmoe {

namespace fs = std::filesystem;

HfLayout plan_hf_layout(const ModelConfig& config, DType dtype, std::uint64_t max_shard_bytes) {
  UPMOE_CHECK(dtype == DType::kBF16 || dtype == DType::kF32, "models are written in bf16 or fp32, not {}",
              name_of(dtype));
  const std::string stored = dtype == DType::kBF16 ? "BF16" : "F32";
  HfLayout layout;
  std::uint64_t in_file = 0;
  for (const HfTensor& t : hf_tensors_of(config)) {
    const auto bytes = static_cast<std::uint64_t>(t.elements()) * size_of(dtype);
    if (layout.files.empty() || (in_file > 0 && in_file + bytes > max_shard_bytes)) {
      layout.files.emplace_back();
      in_file = 0;
    }
    layout.files.back().entries.push_back({t.name, stored, t.shape, 0, 0});
    if (t.zeros) layout.zeros.insert(t.name);
    in_file += bytes;
    layout.total_size += bytes;
  }
  const std::size_t count = layout.files.size();
  std::map<std::string, std::string> weight_map;
  for (std::size_t i = 0; i < count; ++i) {
    HfLayout::File& f = layout.files[i];
    f.name = count == 1 ? "model.safetensors" : fmt::format("model-{:05}-of-{:05}.safetensors", i + 1, count);
    f.header = make_safetensors_header(f.entries, {{"format", "pt"}});
    f.bytes = f.header.size() + f.entries.back().end;
    for (const SafetensorsEntry& e : f.entries) weight_map[e.name] = f.name;
  }
  if (count > 1)
    layout.index_json =
        nlohmann::json{{"metadata", {{"total_size", layout.total_size}}}, {"weight_map", weight_map}}.dump(
            2) +
        "\n";
  return layout;
}

namespace {

constexpr std::uint64_t kSmallFiles = std::uint64_t{4} << 20;  // headers, index, configuration

std::map<std::string, std::pair<ParamSpec, Box>> places_of(const ModelConfig& config) {
  std::map<std::string, std::pair<ParamSpec, Box>> places;
  for (const ParamSpec& p : make_param_table(config))
    for (const HfTensor& t : hf_tensors_of(config, p)) places.emplace(t.name, std::pair(p, t.part));
  return places;
}

struct Source {
  std::map<std::string, std::pair<ParamSpec, Box>> places;  // of all that are not zeros
  const ReadTensor& read;
};

void write_file(const fs::path& path, const HfLayout::File& layout, DType dtype, const Source& source) {
  PosixFile file = PosixFile::create(path);
  file.write(std::as_bytes(std::span(layout.header)));
  std::vector<std::byte> buffer;
  for (const SafetensorsEntry& e : layout.entries) {
    watchdog::heartbeat();
    buffer.assign(static_cast<std::size_t>(e.end - e.begin), std::byte{0});
    if (const auto it = source.places.find(e.name); it != source.places.end()) {
      const auto& [param, part] = it->second;
      source.read(param, part, TensorView{buffer.data(), part.extent, dtype, {}});
    }
    file.write(buffer);
  }
  file.sync();
  if (PosixFile::open_read(path).size() != layout.bytes)
    fail(ExitCode::kBadInput, "{}: not {} bytes after writing; the disk may be full", path.string(),
         layout.bytes);
}

}  // namespace

void write_hf_model(const HfOutput& output, const ModelConfig& config, const ReadTensor& read) {
  StagedDirectory stage(output.dir, output.inputs);
  const HfLayout layout = plan_hf_layout(config, output.dtype, output.max_shard_bytes);
  require_free_space(stage.target(), layout.total_size + companion_bytes(output.companions) + kSmallFiles);
  stage.create();
  const Source source{places_of(config), read};
  for (const HfLayout::File& f : layout.files) write_file(stage.path() / f.name, f, output.dtype, source);
  if (!layout.index_json.empty())
    write_text_synced(stage.path() / "model.safetensors.index.json", layout.index_json);
  ModelConfig written = config;
  // Buffers that the family has no tensor for are not in the files.
  written.router_load = written.router_bias = false;
  written.dtype = output.dtype == DType::kBF16 ? "bfloat16" : "float32";
  write_text_synced(stage.path() / "config.json", to_hf_json(written));
  if (!output.companions.empty()) copy_companions(output.companions, stage.path());
  stage.commit();
}

}  // namespace upmoe
