#include <sys/statvfs.h>

#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>

#include "data/hf_model.h"
#include "data/posix_file.h"
#include "kernels/core/log.h"
#include "parallel/watchdog.h"

namespace upmoe {

namespace fs = std::filesystem;

const std::vector<std::string>& companion_files() {
  static const std::vector<std::string> names{
      "tokenizer.json",      "tokenizer_config.json",   "vocab.json",
      "merges.txt",          "special_tokens_map.json", "added_tokens.json",
      "chat_template.jinja", "generation_config.json",  "LICENSE",
      "LICENSE.txt",         "tokenizer.model",         "qwen.tiktoken"};
  return names;
}

void require_free_space(const fs::path& dir, std::uint64_t bytes) {
  fs::path existing = fs::absolute(dir);
  while (!fs::exists(existing) && existing.has_relative_path()) existing = existing.parent_path();
  struct statvfs info {};
  if (statvfs(existing.c_str(), &info) != 0)
    fail(ExitCode::kBadInput, "{}: {}", existing.string(), std::strerror(errno));
  const std::uint64_t available = static_cast<std::uint64_t>(info.f_bavail) * info.f_frsize;
  if (available < bytes)
    fail(ExitCode::kBadInput, "{}: {} bytes are needed, {} are free; remove something or write elsewhere",
         existing.string(), bytes, available);
}

HfLayout plan_hf_layout(const ModelConfig& config, DType dtype, std::uint64_t max_shard_bytes) {
  UPMOE_CHECK(dtype == DType::kBF16 || dtype == DType::kF32, "models are written in bf16 or fp32, not {}",
              name_of(dtype));
  const std::string stored = dtype == DType::kBF16 ? "BF16" : "F32";
  HfLayout layout;
  std::uint64_t in_file = 0;
  for (const HfTensor& t : hf_tensors_of(config)) {
    const auto bytes = static_cast<std::uint64_t>(t.part.elements()) * size_of(dtype);
    if (layout.files.empty() || (in_file > 0 && in_file + bytes > max_shard_bytes)) {
      layout.files.emplace_back();
      in_file = 0;
    }
    layout.files.back().entries.push_back({t.name, stored, t.shape, 0, 0});
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

std::map<std::string, std::pair<ParamSpec, Box>> places_of(const ModelConfig& config) {
  std::map<std::string, std::pair<ParamSpec, Box>> places;
  for (const ParamSpec& p : make_param_table(config))
    for (const HfTensor& t : hf_tensors_of(p)) places.emplace(t.name, std::pair(p, t.part));
  return places;
}

void write_file(const fs::path& path, const HfLayout::File& layout, DType dtype,
                const std::map<std::string, std::pair<ParamSpec, Box>>& places, const ReadTensor& read) {
  PosixFile file = PosixFile::create(path);
  file.write(std::as_bytes(std::span(layout.header)));
  std::vector<std::byte> buffer;
  for (const SafetensorsEntry& e : layout.entries) {
    watchdog::heartbeat();
    const auto& [param, part] = places.at(e.name);
    buffer.resize(static_cast<std::size_t>(e.end - e.begin));
    read(param, part, TensorView{buffer.data(), part.extent, dtype, {}});
    file.write(buffer);
  }
  file.sync();
  if (PosixFile::open_read(path).size() != layout.bytes)
    fail(ExitCode::kBadInput, "{}: not {} bytes after writing; the disk may be full", path.string(),
         layout.bytes);
}

void write_directory(const fs::path& dir, const ModelConfig& config, DType dtype, const ReadTensor& read,
                     const fs::path& companions, std::uint64_t max_shard_bytes) {
  if (fs::exists(dir) && !(fs::is_directory(dir) && fs::is_empty(dir)))
    fail(ExitCode::kUsage, "{}: exists and is not an empty directory; choose another, or remove it",
         dir.string());
  const HfLayout layout = plan_hf_layout(config, dtype, max_shard_bytes);
  require_free_space(dir, layout.total_size + (std::uint64_t{4} << 20));
  fs::path partial = fs::absolute(dir).lexically_normal();
  if (!partial.has_filename()) partial = partial.parent_path();  // "DIR/" is DIR
  const fs::path target = partial;
  partial += ".tmp";
  fs::remove_all(partial);  // of an attempt that was cut off
  fs::create_directories(partial);
  const auto places = places_of(config);
  for (const HfLayout::File& f : layout.files) write_file(partial / f.name, f, dtype, places, read);
  if (!layout.index_json.empty())
    write_text_synced(partial / "model.safetensors.index.json", layout.index_json);
  ModelConfig written = config;
  written.dtype = dtype == DType::kBF16 ? "bfloat16" : "float32";
  write_text_synced(partial / "config.json", to_hf_json(written));
  if (!companions.empty())
    for (const std::string& name : companion_files())
      if (fs::is_regular_file(companions / name)) {
        fs::copy_file(companions / name, partial / name);
        sync_path(partial / name);
      }
  sync_path(partial);
  if (fs::exists(target)) fs::remove(target);  // an empty directory
  fs::rename(partial, target);
  sync_path(target.parent_path());
}

}  // namespace

void write_hf_model(const fs::path& dir, const ModelConfig& config, DType dtype, const ReadTensor& read,
                    const fs::path& companions, std::uint64_t max_shard_bytes) {
  try {
    write_directory(dir, config, dtype, read, companions, max_shard_bytes);
  } catch (const fs::filesystem_error& e) {  // no permission, read-only, a file where a folder should be
    fail(ExitCode::kBadInput, "{}: cannot be written: {}", dir.string(), e.what());
  }
}

}  // namespace upmoe
