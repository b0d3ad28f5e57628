#include "data/hf_model.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <nlohmann/json.hpp>
#include <set>
#include <type_traits>

#include "data/box_runs.h"
#include "data/posix_file.h"
#include "kernels/core/log.h"

namespace upmoe {

namespace fs = std::filesystem;

namespace {

constexpr std::uint64_t kIndexLimit = std::uint64_t{64} << 20;
constexpr std::size_t kListed = 20;  // differences in one message

// name -> file, from model.safetensors.index.json. Values must be plain names of files beside the index.
std::map<std::string, std::string> read_index(const fs::path& path) {
  std::map<std::string, std::string> map;
  std::set<std::string> seen;
  // Objects with equal keys silently keep the last one in this library; the callback sees each key as it
  // comes.
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

float half_to_float(std::uint16_t h) {
  const std::uint32_t sign = static_cast<std::uint32_t>(h & 0x8000u) << 16, exponent = (h >> 10) & 0x1fu,
                      mantissa = h & 0x3ffu;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | mantissa << 13);
  if (exponent != 0) return std::bit_cast<float>(sign | (exponent + 112) << 23 | mantissa << 13);
  const float magnitude = static_cast<float>(mantissa) * (1.0f / 16777216.0f);  // 2^-24: subnormal
  return sign != 0 ? -magnitude : magnitude;
}

struct Half {
  std::uint16_t bits;
};
float value_of(float v) {
  return v;
}
float value_of(bf16 v) {
  return to_float(v);
}
float value_of(Half v) {
  return half_to_float(v.bits);
}

template <class From, class To>
void convert_to(const std::byte* in, std::int64_t n, To* out) {
  for (std::int64_t i = 0; i < n; ++i) {
    From stored;
    std::memcpy(&stored, in + static_cast<std::size_t>(i) * sizeof(From), sizeof(From));
    if constexpr (std::is_same_v<To, float>) {
      out[i] = value_of(stored);
    } else {
      out[i] = to_bf16(value_of(stored));
    }
  }
}

template <class From>
void convert_from(const std::byte* in, std::int64_t n, TensorView out, std::int64_t at) {
  if (out.dtype == DType::kF32) return convert_to<From>(in, n, out.as<float>() + at);
  convert_to<From>(in, n, out.as<bf16>() + at);
}

// n elements as stored -> out[at..] in out's dtype.
void convert(const std::byte* in, const std::string& from, std::int64_t n, TensorView out, std::int64_t at) {
  if ((from == "F32" && out.dtype == DType::kF32) || (from == "BF16" && out.dtype == DType::kBF16)) {
    std::memcpy(out.data + static_cast<std::size_t>(at) * size_of(out.dtype), in,
                static_cast<std::size_t>(n) * size_of(out.dtype));
  } else if (from == "F32") {
    convert_from<float>(in, n, out, at);
  } else if (from == "BF16") {
    convert_from<bf16>(in, n, out, at);
  } else {
    convert_from<Half>(in, n, out, at);
  }
}

// Reads runs of one tensor, given in the order of the file: neighbours there become one read, however they
// are scattered in `out` (gate and up interleave), and no read needs more than a small buffer.
class RunReader {
 public:
  RunReader(const SafetensorsFile& file, const SafetensorsEntry& entry, TensorView out)
      : file_(file), entry_(entry), out_(out), element_(entry.dtype == "F32" ? 4 : 2) {}
  void add(std::int64_t from, std::int64_t to, std::int64_t n) {
    while (n > 0) {
      if (!runs_.empty() && (from != end_ || end_ - runs_.front().from == kStaged)) flush();
      const std::int64_t begin = runs_.empty() ? from : runs_.front().from;
      const std::int64_t taken = std::min(n, kStaged - (from - begin));
      runs_.push_back({from, to, taken});
      end_ = from + taken;
      from += taken;
      to += taken;
      n -= taken;
    }
  }
  void flush() {
    if (runs_.empty()) return;
    const std::int64_t begin = runs_.front().from;
    staged_.resize(static_cast<std::size_t>(end_ - begin) * element_);
    file_.read(entry_, static_cast<std::uint64_t>(begin) * element_, staged_);
    for (const Run& r : runs_)
      convert(staged_.data() + static_cast<std::size_t>(r.from - begin) * element_, entry_.dtype, r.n, out_,
              r.to);
    runs_.clear();
  }

 private:
  static constexpr std::int64_t kStaged = std::int64_t{4} << 20;  // elements
  struct Run {
    std::int64_t from, to, n;
  };
  const SafetensorsFile& file_;
  const SafetensorsEntry& entry_;
  TensorView out_;
  std::size_t element_;
  std::vector<Run> runs_;
  std::int64_t end_ = 0;
  std::vector<std::byte> staged_;
};

bool is_ignored(const std::string& name, const ModelConfig& config) {
  return name.ends_with(".rotary_emb.inv_freq") || (config.tie_word_embeddings && name == "lm_head.weight");
}

}  // namespace

HfModel::HfModel(const fs::path& dir) : dir_(dir), config_(read_model_config(dir)) {
  const fs::path index = dir / "model.safetensors.index.json", single = dir / "model.safetensors";
  std::map<std::string, std::string> file_of;
  std::vector<std::string> names;
  if (fs::exists(index)) {
    if (fs::exists(single))
      log::warning("{}: model.safetensors and an index are both there; the index is used", dir.string());
    file_of = read_index(index);
    std::set<std::string> unique;
    for (const auto& [tensor, file] : file_of) unique.insert(file);
    names.assign(unique.begin(), unique.end());
  } else if (fs::exists(single)) {
    names = {"model.safetensors"};
  } else {
    fail(ExitCode::kBadInput, "{}: neither model.safetensors nor model.safetensors.index.json is there",
         dir.string());
  }
  for (const std::string& name : names) {
    if (fs::weakly_canonical(dir / name).parent_path() != fs::weakly_canonical(dir))
      log::warning("{}: a link to {}", (dir / name).string(), fs::weakly_canonical(dir / name).string());
    files_.emplace_back(dir / name);
    const auto& entries = files_.back().header().entries;
    for (std::size_t e = 0; e < entries.size(); ++e)
      if (!index_.emplace(entries[e].name, std::pair(files_.size() - 1, e)).second)
        fail(ExitCode::kBadInput, "{}: tensor '{}' stands in {} and in another file", dir.string(),
             entries[e].name, name);
  }
  check_against(file_of, names);
}

// Every difference between the files, the index and the config, in one message.
void HfModel::check_against(const std::map<std::string, std::string>& file_of,
                            const std::vector<std::string>& names) const {
  std::vector<std::string> differences;
  for (const auto& [tensor, file] : file_of) {
    const auto it = index_.find(tensor);
    if (it == index_.end() || names[it->second.first] != file)
      differences.push_back(
          fmt::format("{}: the index says {}, {}", tensor, file,
                      it == index_.end() ? "no file holds it" : "it is in " + names[it->second.first]));
  }
  std::set<std::string> expected;
  for (const HfTensor& t : hf_tensors_of(config_)) {
    expected.insert(t.name);
    const auto it = index_.find(t.name);
    if (it == index_.end()) {
      differences.push_back(t.name + ": missing");
      continue;
    }
    const SafetensorsEntry& e = files_[it->second.first].header().entries[it->second.second];
    if (e.shape != t.shape)
      differences.push_back(fmt::format("{}: shape [{}], expected [{}]", t.name, fmt::join(e.shape, ", "),
                                        fmt::join(t.shape, ", ")));
    if (e.dtype != "BF16" && e.dtype != "F32" && e.dtype != "F16")
      differences.push_back(fmt::format("{}: dtype {}, expected BF16, F32 or F16", t.name, e.dtype));
    if (!file_of.empty() && !file_of.contains(t.name))
      differences.push_back(t.name + ": in a file but not in the index");
  }
  for (const auto& [name, place] : index_)
    if (!expected.contains(name) && !is_ignored(name, config_))
      differences.push_back(name + ": not part of the model of config.json");
  if (differences.empty()) return;
  std::string text;
  for (std::size_t i = 0; i < std::min(kListed, differences.size()); ++i) text += "\n  " + differences[i];
  if (differences.size() > kListed) text += fmt::format("\n  and {} more", differences.size() - kListed);
  fail(ExitCode::kBadInput, "{}: the files are not the model of config.json:{}", dir_.string(), text);
}

std::pair<const SafetensorsFile*, const SafetensorsEntry*> HfModel::locate(const std::string& tensor) const {
  const auto it = index_.find(tensor);
  if (it == index_.end()) fail(ExitCode::kBadInput, "{}: holds no tensor '{}'", dir_.string(), tensor);
  const SafetensorsFile& file = files_[it->second.first];
  return {&file, &file.header().entries[it->second.second]};
}

void HfModel::read(const ParamSpec& param, const Box& box, TensorView out) const {
  UPMOE_CHECK(contains(whole(param.shape), box) && out.elements() == box.elements(),
              "box {} + {} of {} {} into {}", box.offset.str(), box.extent.str(), param.name,
              param.shape.str(), out.shape.str());
  for (const HfTensor& t : hf_tensors_of(param)) {
    const Box region = intersect(t.part, box);
    if (region.elements() == 0) continue;
    const auto [file, entry] = locate(t.name);
    RunReader reader(*file, *entry, out);
    for_runs(t.part, box, region,
             [&](std::int64_t from, std::int64_t to, std::int64_t n) { reader.add(from, to, n); });
    reader.flush();
  }
}

std::uint64_t HfModel::data_bytes() const {
  std::uint64_t n = 0;
  for (const SafetensorsEntry* e : tensors()) n += e->end - e->begin;
  return n;
}

std::vector<const SafetensorsEntry*> HfModel::tensors() const {
  std::vector<const SafetensorsEntry*> all;
  for (const SafetensorsFile& f : files_)
    for (const SafetensorsEntry& e : f.header().entries) all.push_back(&e);
  return all;
}

}  // namespace upmoe
