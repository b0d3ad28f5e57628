#include "data/companions.h"

#include <algorithm>
#include <cctype>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <string_view>

#include "data/folder.h"
#include "data/posix_file.h"
#include "kernels/core/log.h"

namespace upmoe {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kFiles[] = {"tokenizer.json",
                                       "tokenizer_config.json",
                                       "vocab.json",
                                       "merges.txt",
                                       "special_tokens_map.json",
                                       "added_tokens.json",
                                       "chat_template.jinja",
                                       "chat_template.json",
                                       "generation_config.json",
                                       "tokenizer.model",
                                       "spiece.model",
                                       "qwen.tiktoken",
                                       "LICENSE",
                                       "LICENSE.txt",
                                       "LICENSE.md",
                                       "NOTICE",
                                       "NOTICE.txt"};
constexpr std::uintmax_t kMostConfigBytes = 16u << 20;
constexpr std::string_view kTemplates = "additional_chat_templates";  // a folder of .jinja files

bool lies_in(const fs::path& file, const fs::path& folder) {
  return std::mismatch(folder.begin(), folder.end(), file.begin(), file.end()).first == folder.end();
}

bool is_carried(const fs::path& dir, const fs::path& name, bool say) {
  const fs::path path = dir / name;
  if (!fs::is_regular_file(path)) return false;  // links are followed
  // A link that leads out of the folder could name any file of the machine, which an export would then publish.
  const fs::path real = fs::canonical(path);
  if (lies_in(real, dir) || is_blob_of(real, dir)) return true;
  if (say)
    log::warning(
        "{}: leads to {}, outside the model's folder; it is not carried along. Copy it yourself if it "
        "belongs to the model",
        path.string(), real.string());
  return false;
}

// The publisher's code that config.json names: "auto_map": {"AutoConfig": "configuration_x.XConfig"}, modules that lie
// beside it. Those of another repository, "publisher/model--module.Class", are fetched from there.
std::set<std::string> named_code(const fs::path& dir) {
  std::set<std::string> files;
  const fs::path config = dir / "config.json";
  if (!fs::is_regular_file(config) || fs::file_size(config) > kMostConfigBytes) return files;
  const auto json = nlohmann::json::parse(std::ifstream(config), nullptr, false);
  if (!json.is_object() || !json.contains("auto_map") || !json["auto_map"].is_object()) return files;
  for (const auto& entry : json["auto_map"])
    for (const auto& one : entry.is_array() ? entry : nlohmann::json::array({entry})) {
      const std::string name = one.is_string() ? one.get<std::string>() : "";
      const std::size_t dot = name.find('.');
      const auto is_of_a_name = [](unsigned char c) { return std::isalnum(c) != 0 || c == '_'; };
      if (dot != std::string::npos && dot > 0 &&
          std::all_of(name.begin(), name.begin() + static_cast<std::ptrdiff_t>(dot), is_of_a_name))
        files.insert(name.substr(0, dot) + ".py");
    }
  return files;
}

std::vector<fs::path> companions_of(const fs::path& given, bool say) {
  std::vector<fs::path> found;
  if (!fs::is_directory(given)) return found;
  const fs::path dir = fs::canonical(given);
  for (const std::string_view name : kFiles)
    if (is_carried(dir, name, say)) found.emplace_back(name);
  for (const std::string& name : named_code(dir))
    if (is_carried(dir, name, say)) found.emplace_back(name);
  if (!fs::is_directory(dir / kTemplates)) return found;
  std::vector<fs::path> templates;
  for (const auto& entry : fs::directory_iterator(dir / kTemplates)) {
    const fs::path name = fs::path(kTemplates) / entry.path().filename();
    if (name.extension() == ".jinja" && is_carried(dir, name, say)) templates.push_back(name);
  }
  std::sort(templates.begin(), templates.end());
  found.insert(found.end(), templates.begin(), templates.end());
  return found;
}

void copy_whole(const fs::path& from, const fs::path& to) {
  const PosixFile in = PosixFile::open_read(from);
  PosixFile out = PosixFile::create(to);
  std::vector<std::byte> block(std::size_t{1} << 20);
  const std::uint64_t size = in.size();
  for (std::uint64_t at = 0; at < size; at += block.size()) {
    const auto n = static_cast<std::size_t>(std::min<std::uint64_t>(block.size(), size - at));
    in.read(at, std::span(block).first(n));
    out.write(std::span(block).first(n));
  }
  out.sync();
}

}  // namespace

bool is_companion(const std::string& name) {
  return std::find(std::begin(kFiles), std::end(kFiles), name) != std::end(kFiles);
}

std::vector<fs::path> companions_in(const fs::path& dir) {
  return with_system_errors([&] { return companions_of(dir, false); });
}

std::uint64_t companion_bytes(const fs::path& dir) {
  std::uint64_t bytes = 0;
  for (const fs::path& name : companions_in(dir)) bytes += PosixFile::open_read(dir / name).size();
  return bytes;
}

void copy_companions(const fs::path& from, const fs::path& to) {
  for (const fs::path& name : with_system_errors([&] { return companions_of(from, true); })) {
    if (name.has_parent_path()) make_folders((to / name).parent_path());
    copy_whole(from / name, to / name);
    if (name.has_parent_path()) sync_path((to / name).parent_path());
  }
}

}  // namespace upmoe
