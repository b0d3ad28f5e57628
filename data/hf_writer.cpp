#include "data/hf_writer.h"

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>

#include "configs/families/family.h"
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
  HfLayout layout;
  std::uint64_t in_file = 0;
  for (const HfTensor& t : hf_tensors_of(config)) {
    if (t.begin > 0) continue;  // another part of the tensor
    const DType stored = t.fp32 ? DType::kF32 : dtype;
    const auto bytes = static_cast<std::uint64_t>(t.elements()) * size_of(stored);
    if (layout.files.empty() || (in_file > 0 && in_file + bytes > max_shard_bytes)) {
      layout.files.emplace_back();
      in_file = 0;
    }
    layout.files.back().entries.push_back({t.name, stored == DType::kBF16 ? "BF16" : "F32", t.shape, 0, 0});
    if (t.zeros) layout.zeros.insert(t.name);
    in_file += bytes;
    layout.total_size += bytes;
  }
  const std::size_t count = layout.files.size();
  std::map<std::string, std::string> weight_map;
  for (std::size_t i = 0; i < count; ++i) {
    HfLayout::File& f = layout.files[i];
    // The wider ones first, as safetensors' own writer has them: a reader maps each at a multiple of its size.
    std::stable_partition(f.entries.begin(), f.entries.end(),
                          [](const SafetensorsEntry& e) { return e.dtype == "F32"; });
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

using Parts = std::vector<std::pair<ParamSpec, HfTensor>>;

std::map<std::string, Parts> parts_of(const ModelConfig& config) {
  std::map<std::string, Parts> parts;
  for (const ParamSpec& p : make_param_table(config))
    for (HfTensor& t : hf_tensors_of(config, p)) parts[t.name].emplace_back(p, t);
  return parts;
}

struct Source {
  std::map<std::string, Parts> parts;  // by tensor, of all that are not zeros
  const ReadTensor& read;
};

// The part of a parameter into its place in the tensor.
void read_part(const ParamSpec& param, const HfTensor& t, DType dtype, const ReadTensor& read,
               std::span<std::byte> tensor) {
  const std::size_t size = size_of(dtype);
  const std::span<std::byte> place = tensor.subspan(static_cast<std::size_t>(t.begin) * size,
                                                    static_cast<std::size_t>(t.part.elements()) * size);
  if (!t.transposed) return read(param, t.part, TensorView{place.data(), t.part.extent, dtype, {}});
  UPMOE_CHECK(t.part.extent.rank == 3, "{}: {}", t.name, t.part.extent.str());
  std::vector<std::byte> own(place.size());
  read(param, t.part, TensorView{own.data(), t.part.extent, dtype, {}});
  const auto rows = static_cast<std::size_t>(t.part.extent[1]),
             columns = static_cast<std::size_t>(t.part.extent[2]);
  for (std::size_t r = 0; r < rows; ++r)
    for (std::size_t c = 0; c < columns; ++c)
      std::memcpy(place.data() + (c * rows + r) * size, own.data() + (r * columns + c) * size, size);
}

void write_file(const fs::path& path, const HfLayout::File& layout, const Source& source) {
  PosixFile file = PosixFile::create(path);
  file.write(std::as_bytes(std::span(layout.header)));
  std::vector<std::byte> buffer;
  for (const SafetensorsEntry& e : layout.entries) {
    watchdog::heartbeat();
    buffer.assign(static_cast<std::size_t>(e.end - e.begin), std::byte{0});
    const DType dtype = e.dtype == "BF16" ? DType::kBF16 : DType::kF32;
    if (const auto it = source.parts.find(e.name); it != source.parts.end())
      for (const auto& [param, part] : it->second) read_part(param, part, dtype, source.read, buffer);
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
  const Source source{parts_of(config), read};
  for (const HfLayout::File& f : layout.files) write_file(stage.path() / f.name, f, source);
  if (!layout.index_json.empty())
    write_text_synced(stage.path() / "model.safetensors.index.json", layout.index_json);
  ModelConfig written = config;
  // Buffers and adapters that the family has no tensor for are not in the files.
  written.router_load = false;
  written.router_bias = config.router_bias && family_of(config).carries.has(Trait::kChoiceBias);
  written.lora = {};
  written.router = config.router.served();  // its readers do not train it as we did
  written.dtype = file_dtype_of(output.dtype);
  write_text_synced(stage.path() / "config.json", to_hf_json(written));
  if (!output.companions.empty()) copy_companions(output.companions, stage.path());
  stage.commit();
}

}  // namespace upmoe
