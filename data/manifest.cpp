#include "data/manifest.h"

#include <nlohmann/json.hpp>

#include "data/crc.h"

namespace upmoe {

using nlohmann::json;

namespace {

constexpr const char* kFormat = "upmoe-store-1";

json to_json(const Shape& s) {
  return std::vector<std::int64_t>(s.dim.begin(), s.dim.begin() + s.rank);
}

Shape shape_from(const json& j) {
  if (!j.is_array() || j.size() > 4) fail(ExitCode::kBadInput, "a shape has at most 4 dims");
  Shape s;
  for (const json& n : j) {
    if (!n.is_number_unsigned() || n.get<std::uint64_t>() > std::uint64_t{1} << 62)
      fail(ExitCode::kBadInput, "a dim is {}, expected a count", n.dump());
    s.dim[static_cast<std::size_t>(s.rank++)] = n.get<std::int64_t>();
  }
  s.elements();  // throws on overflow
  return s;
}

std::uint64_t count_from(const json& j, const char* key) {
  const json& n = j.at(key);
  if (!n.is_number_unsigned()) fail(ExitCode::kBadInput, "'{}' is {}, expected a count", key, n.dump());
  return n.get<std::uint64_t>();
}

DType dtype_from(const std::string& name) {
  for (const DType t : {DType::kF32, DType::kBF16})
    if (name == name_of(t)) return t;
  fail(ExitCode::kBadInput, "dtype '{}', expected fp32 or bf16", name);
}

json body_of(const Manifest& m) {
  json files = json::array(), tensors = json::array();
  for (const StoredFile& f : m.files)
    files.push_back({{"name", f.name}, {"bytes", f.bytes}, {"crc32c", f.crc}});
  for (const auto& [key, t] : m.tensors) {
    json pieces = json::array();
    for (const StoredPiece& p : t.pieces) {
      json boxes = json::array();
      for (const Box& b : p.boxes) boxes.push_back({to_json(b.offset), to_json(b.extent)});
      pieces.push_back({{"file", p.file}, {"dataset", p.dataset}, {"offset", p.offset}, {"boxes", boxes}});
    }
    tensors.push_back({{"name", key.first},
                       {"kind", key.second},
                       {"dtype", name_of(t.dtype)},
                       {"shape", to_json(t.shape)},
                       {"pieces", pieces}});
  }
  return {{"format", kFormat}, {"run", json::parse(m.run)}, {"files", files}, {"tensors", tensors}};
}

StoredPiece piece_from(const json& j, const StoredTensor& tensor, const Manifest& m) {
  StoredPiece p;
  p.file = count_from(j, "file");
  p.dataset = j.at("dataset").get<std::string>();
  p.offset = count_from(j, "offset");
  if (p.file >= m.files.size()) fail(ExitCode::kBadInput, "file {} of {}", p.file, m.files.size());
  std::int64_t elements = 0;
  for (const json& b : j.at("boxes")) {
    const Box box{shape_from(b.at(0)), shape_from(b.at(1))};
    if (box.offset.rank != tensor.shape.rank || box.extent.rank != tensor.shape.rank ||
        !contains(whole(tensor.shape), box))
      fail(ExitCode::kBadInput, "a box {} + {} lies outside {}", box.offset.str(), box.extent.str(),
           tensor.shape.str());
    elements = checked_add(elements, box.elements());
    p.boxes.push_back(box);
  }
  const std::int64_t bytes = checked_mul(elements, static_cast<std::int64_t>(size_of(tensor.dtype)));
  const std::uint64_t file_bytes = m.files[p.file].bytes;
  if (p.offset > file_bytes || static_cast<std::uint64_t>(bytes) > file_bytes - p.offset)
    fail(ExitCode::kBadInput, "{} bytes at {} of {}, which has {}", bytes, p.offset, m.files[p.file].name,
         file_bytes);
  return p;
}

Manifest from_body(const json& j) {
  if (j.at("format") != kFormat)
    throw FormatError(
        fmt::format("its format is {}, this program reads {}; use the program that wrote it, or a newer one",
                    j.at("format").dump(), kFormat));
  Manifest m;
  m.run = j.at("run").dump();
  for (const json& f : j.at("files")) {
    StoredFile file{f.at("name").get<std::string>(), count_from(f, "bytes"),
                    static_cast<std::uint32_t>(count_from(f, "crc32c"))};
    if (file.name.empty() || file.name.find('/') != std::string::npos || file.name.front() == '.')
      fail(ExitCode::kBadInput, "file name '{}' leaves the folder", file.name);
    m.files.push_back(file);
  }
  for (const json& t : j.at("tensors")) {
    StoredTensor tensor;
    tensor.shape = shape_from(t.at("shape"));
    tensor.dtype = dtype_from(t.at("dtype").get<std::string>());
    for (const json& p : t.at("pieces")) tensor.pieces.push_back(piece_from(p, tensor, m));
    const std::pair<std::string, std::string> key{t.at("name").get<std::string>(),
                                                  t.at("kind").get<std::string>()};
    if (!m.tensors.emplace(key, std::move(tensor)).second)
      fail(ExitCode::kBadInput, "tensor {} ({}) stands there twice", key.first, key.second);
  }
  return m;
}

void require_covered(const Manifest& m) {
  for (const auto& [key, t] : m.tensors) {
    std::int64_t covered = 0;
    for (const StoredPiece& p : t.pieces)
      for (const Box& b : p.boxes) covered = checked_add(covered, b.elements());
    // Every box lies inside the tensor (piece_from). Counted like this, boxes that overlap could hide a hole of the
    // same size; a writer's boxes cannot, as each rank's are a flat range of its own.
    if (covered != t.shape.elements())
      fail(ExitCode::kBadInput, "{} ({}): {} of {} elements were written", key.first, key.second, covered,
           t.shape.elements());
  }
}

}  // namespace

std::string manifest_json(const Manifest& manifest) {
  require_covered(manifest);
  json j = body_of(manifest);
  const std::string text = j.dump();
  j["checksum"] = crc32c(text.data(), text.size());
  return j.dump(1) + "\n";
}

Manifest parse_manifest(const std::string& text, const std::string& where) {
  try {
    json j = json::parse(text);
    const std::uint64_t expected = count_from(j, "checksum");
    // The checksum is of the object without itself, dumped again: keys are sorted, so the same object has the same
    // text.
    j.erase("checksum");
    const std::string body = j.dump();
    const std::uint32_t found = crc32c(body.data(), body.size());
    if (found != expected)
      fail(ExitCode::kBadInput, "its own checksum is {:08x}, expected {:08x}", found, expected);
    Manifest m = from_body(j);
    require_covered(m);
    return m;
  } catch (const json::exception& e) {
    fail(ExitCode::kBadInput, "{}: damaged manifest: {}; use an older checkpoint", where, e.what());
  } catch (const FormatError& e) {  // its checksum is right: no damage
    throw FormatError(fmt::format("{}: {}", where, e.what()));
  } catch (const Error& e) {
    fail(ExitCode::kBadInput, "{}: damaged manifest: {}; use an older checkpoint", where, e.what());
  }
}

std::string shard_json(const Manifest& shard) {
  return body_of(shard).dump();
}
Manifest parse_shard(const std::string& text) {
  try {
    return from_body(json::parse(text));
  } catch (const json::exception& e) {
    fail(ExitCode::kBadInput, "a rank's table of its shard is broken: {}", e.what());
  }
}

void merge(Manifest& whole_store, const Manifest& shard) {
  const std::size_t first = whole_store.files.size();
  whole_store.files.insert(whole_store.files.end(), shard.files.begin(), shard.files.end());
  for (const auto& [key, t] : shard.tensors) {
    StoredTensor& tensor =
        whole_store.tensors.try_emplace(key, StoredTensor{t.shape, t.dtype, {}}).first->second;
    if (!(tensor.shape == t.shape) || tensor.dtype != t.dtype)
      fail(ExitCode::kFailure, "the ranks disagree about {} ({}): {} {} and {} {}", key.first, key.second,
           name_of(tensor.dtype), tensor.shape.str(), name_of(t.dtype), t.shape.str());
    for (StoredPiece p : t.pieces) {
      // A shard numbers its one file 0; here it stands behind the files of the ranks before.
      p.file += first;
      tensor.pieces.push_back(std::move(p));
    }
  }
}

}  // namespace upmoe
