#include "data/safetensors.h"

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>
#include <set>

#include "data/posix_file.h"
#include "data/staged_directory.h"

namespace upmoe {

namespace {

using nlohmann::json;

constexpr std::uint64_t kHeaderLimit = 100'000'000;  // the format's own
constexpr std::size_t kNameLimit = 4096;
constexpr std::size_t kDimLimit = 16;
constexpr std::uint64_t kUnset = ~std::uint64_t{0};

std::uint64_t bits_of(const std::string& dtype) {
  static const std::map<std::string, std::uint64_t> bits{
      {"BOOL", 8},        {"U8", 8},          {"I8", 8},    {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8},
      {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8}, {"F4", 4},    {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"I16", 16},
      {"U16", 16},        {"F16", 16},        {"BF16", 16}, {"I32", 32},    {"U32", 32},    {"F32", 32},
      {"C64", 64},        {"F64", 64},        {"I64", 64},  {"U64", 64}};
  const auto it = bits.find(dtype);
  return it == bits.end() ? 0 : it->second;
}

// Walks the header as it is parsed, so that duplicate names, fractions and deep nesting are seen and nothing
// is built that the file did not pay for. States by depth: 1 the header, 2 one tensor (or the metadata), 3 a
// list of numbers.
class HeaderParser : public nlohmann::json_sax<json> {
 public:
  SafetensorsHeader header;
  std::string problem;

  bool start_object(std::size_t) override {
    ++depth_;
    if (depth_ == 1) return true;
    if (depth_ > 2) return refuse("an object where none belongs");
    if (name_ != "__metadata__") {
      header.entries.push_back({name_, "", {}, kUnset, kUnset});
      seen_keys_.clear();
    }
    return true;
  }
  bool end_object() override {
    --depth_;
    if (depth_ == 1 && name_ != "__metadata__") {
      if (seen_keys_.size() != 3) return refuse("expected exactly dtype, shape and data_offsets");
    }
    return true;
  }
  bool key(std::string& key) override {
    if (depth_ == 1) {
      if (key.size() > kNameLimit) return refuse("a name longer than 4096 bytes");
      if (!names_.insert(key).second) return refuse(fmt::format("'{}' stands there twice", key));
      name_ = key;
      return true;
    }
    field_ = key;
    if (name_ == "__metadata__") return true;
    if (key != "dtype" && key != "shape" && key != "data_offsets")
      return refuse(fmt::format("unknown field '{}'", key));
    if (!seen_keys_.insert(key).second) return refuse(fmt::format("field '{}' stands there twice", key));
    return true;
  }
  bool start_array(std::size_t) override {
    ++depth_;
    numbers_.clear();
    if (depth_ != 3 || name_ == "__metadata__" || field_ == "dtype")
      return refuse("a list where none belongs");
    return true;
  }
  bool end_array() override {
    --depth_;
    SafetensorsEntry& e = header.entries.back();
    if (field_ == "shape") {
      if (numbers_.size() > kDimLimit) return refuse("more than 16 dims");
      for (const std::uint64_t n : numbers_) {
        if (n > std::uint64_t{1} << 62) return refuse("a dim beyond 2^62");
        e.shape.push_back(static_cast<std::int64_t>(n));
      }
    } else {
      if (numbers_.size() != 2) return refuse("data_offsets need two numbers");
      e.begin = numbers_[0];
      e.end = numbers_[1];
    }
    return true;
  }
  bool number_unsigned(std::uint64_t n) override {
    if (depth_ != 3) return refuse("a number where none belongs");
    if (numbers_.size() <= kDimLimit) numbers_.push_back(n);  // one too many shows; more is not kept
    return true;
  }
  bool string(std::string& s) override {
    if (depth_ != 2) return refuse("a text where none belongs");
    if (name_ == "__metadata__") {
      if (!header.metadata.emplace(field_, s).second)
        return refuse(fmt::format("metadata '{}' stands there twice", field_));
      return true;
    }
    if (field_ != "dtype") return refuse(fmt::format("field '{}' is a text", field_));
    header.entries.back().dtype = s;
    return true;
  }
  bool null() override { return refuse("null"); }
  bool boolean(bool) override { return refuse("true or false"); }
  bool number_integer(std::int64_t n) override { return refuse(fmt::format("negative number {}", n)); }
  bool number_float(double, const std::string& text) override {
    return refuse(fmt::format("number {} is not a count", text));
  }
  bool binary(json::binary_t&) override { return refuse("binary"); }
  bool parse_error(std::size_t at, const std::string&, const nlohmann::detail::exception&) override {
    problem = fmt::format("not JSON at byte {}", at);
    return false;
  }

 private:
  bool refuse(const std::string& what) {
    problem = name_.empty() || depth_ < 2 ? what : fmt::format("tensor '{}': {}", name_, what);
    return false;
  }
  int depth_ = 0;
  std::string name_, field_;
  std::set<std::string> names_, seen_keys_;
  std::vector<std::uint64_t> numbers_;
};

// Bytes that shape and dtype ask for; nothing when the product overflows or is not whole bytes.
std::uint64_t bytes_of(const SafetensorsEntry& e, const std::string& where) {
  std::uint64_t bits = bits_of(e.dtype);
  if (bits == 0) fail(ExitCode::kBadInput, "{}: tensor '{}': unknown dtype '{}'", where, e.name, e.dtype);
  for (const std::int64_t n : e.shape)
    if (__builtin_mul_overflow(bits, static_cast<std::uint64_t>(n), &bits))
      fail(ExitCode::kBadInput, "{}: tensor '{}': its size overflows", where, e.name);
  if (bits % 8 != 0)
    fail(ExitCode::kBadInput, "{}: tensor '{}': {} bits are not whole bytes", where, e.name, bits);
  return bits / 8;
}

// By place in the file, so that each tensor has to begin where the one before it ended. Two ranges of one byte in
// common, a gap, and bytes behind the last one all show as one comparison.
void check_coverage(SafetensorsHeader& header, std::uint64_t data_bytes, const std::string& where) {
  std::sort(header.entries.begin(), header.entries.end(),
            [](const SafetensorsEntry& a, const SafetensorsEntry& b) {
              return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
            });
  std::uint64_t at = 0;
  for (const SafetensorsEntry& e : header.entries) {
    const std::uint64_t bytes = bytes_of(e, where);
    if (e.begin != at || e.end < e.begin)
      fail(ExitCode::kBadInput,
           "{}: tensor '{}': bytes {} to {}, expected to begin at {} (tensors must follow each other without "
           "gap or overlap)",
           where, e.name, e.begin, e.end, at);
    if (e.end - e.begin != bytes)
      fail(ExitCode::kBadInput, "{}: tensor '{}': {} bytes, its shape and dtype need {}", where, e.name,
           e.end - e.begin, bytes);
    at = e.end;
  }
  if (at != data_bytes)
    fail(ExitCode::kBadInput,
         "{}: {} bytes of data, the header speaks of {}; the file may be truncated: fetch it again", where,
         data_bytes, at);
}

}  // namespace

SafetensorsHeader parse_safetensors_header(std::span<const std::byte> bytes, std::uint64_t file_bytes,
                                           const std::string& where) {
  if (file_bytes < 8 || bytes.size() < 8)
    fail(ExitCode::kBadInput, "{}: {} bytes are too few for a safetensors file", where, file_bytes);
  std::uint64_t n = 0;
  std::memcpy(&n, bytes.data(), 8);
  if (n > kHeaderLimit || n > file_bytes - 8 || n > bytes.size() - 8)
    fail(ExitCode::kBadInput,
         "{}: a header of {} bytes in a file of {} (limit {}): not a safetensors file, or truncated", where,
         n, file_bytes, kHeaderLimit);
  const char* text = reinterpret_cast<const char*>(bytes.data()) + 8;
  // What the JSON library would let pass: a byte order mark, and anything behind a zero byte.
  if (n > 0 && (static_cast<unsigned char>(*text) == 0xefu || std::memchr(text, 0, n) != nullptr))
    fail(ExitCode::kBadInput, "{}: header refused: not JSON", where);
  HeaderParser parser;
  if (!json::sax_parse(text, text + n, &parser))
    fail(ExitCode::kBadInput, "{}: header refused: {}", where,
         parser.problem.empty() ? "not an object" : parser.problem);
  parser.header.data_begin = 8 + n;
  check_coverage(parser.header, file_bytes - 8 - n, where);
  return std::move(parser.header);
}

std::string make_safetensors_header(std::vector<SafetensorsEntry>& entries,
                                    const std::map<std::string, std::string>& metadata) {
  nlohmann::ordered_json j = nlohmann::ordered_json::object();
  if (!metadata.empty()) j["__metadata__"] = metadata;
  std::uint64_t at = 0;
  for (SafetensorsEntry& e : entries) {
    e.begin = at;
    at += bytes_of(e, "header");
    e.end = at;
    j[e.name] = {{"dtype", e.dtype}, {"shape", e.shape}, {"data_offsets", {e.begin, e.end}}};
  }
  std::string text = j.dump();
  // Blanks, so that the tensors behind the header are aligned to 8 bytes in the file.
  text.append((8 - text.size() % 8) % 8, ' ');
  const std::uint64_t n = text.size();
  std::string out(8, '\0');
  std::memcpy(out.data(), &n, 8);
  return out + text;
}

SafetensorsFile::SafetensorsFile(const std::filesystem::path& path)
    : path_(path), file_(std::make_unique<PosixFile>(PosixFile::open_read(path))) {
  const std::uint64_t size = file_->size();
  std::vector<std::byte> bytes(8);
  if (size < 8)
    fail(ExitCode::kBadInput, "{}: {} bytes are too few for a safetensors file", path.string(), size);
  file_->read(0, bytes);
  if (std::memcmp(bytes.data(), "version ", 8) == 0)  // no header is that long
    fail(ExitCode::kBadInput,
         "{}: {} bytes of text, a pointer of Git LFS in place of the file; run `git lfs pull` in {}",
         path.string(), size, path.parent_path().string());
  std::uint64_t n = 0;
  std::memcpy(&n, bytes.data(), 8);
  if (n <= kHeaderLimit && n <= size - 8) {  // else the parser says what is wrong
    bytes.resize(8 + static_cast<std::size_t>(n));
    file_->read(8, std::span(bytes).subspan(8));
  }
  header_ = parse_safetensors_header(bytes, size, path.string());
  for (std::size_t i = 0; i < header_.entries.size(); ++i) index_[header_.entries[i].name] = i;
}

SafetensorsFile::~SafetensorsFile() = default;
SafetensorsFile::SafetensorsFile(SafetensorsFile&&) noexcept = default;

const SafetensorsEntry* SafetensorsFile::find(const std::string& name) const {
  const auto it = index_.find(name);
  return it == index_.end() ? nullptr : &header_.entries[it->second];
}

void SafetensorsFile::read(const SafetensorsEntry& entry, std::uint64_t offset,
                           std::span<std::byte> out) const {
  UPMOE_CHECK(offset <= entry.end - entry.begin && out.size() <= entry.end - entry.begin - offset,
              "{} bytes at {} of '{}'", out.size(), offset, entry.name);
  file_->read(header_.data_begin + entry.begin + offset, out);
}

void write_safetensors(StagedFile& file, const std::map<std::string, ConstTensorView>& tensors,
                       const std::map<std::string, std::string>& metadata) {
  static const std::map<DType, std::string> names{{DType::kF32, "F32"},
                                                  {DType::kBF16, "BF16"},
                                                  {DType::kI32, "I32"},
                                                  {DType::kI64, "I64"},
                                                  {DType::kF64, "F64"}};
  std::vector<SafetensorsEntry> entries;
  for (const auto& [name, view] : tensors)
    entries.push_back({name,
                       names.at(view.dtype),
                       {view.shape.dim.begin(), view.shape.dim.begin() + view.shape.rank},
                       0,
                       0});
  const std::string header = make_safetensors_header(entries, metadata);
  file.write(std::as_bytes(std::span(header)));
  for (const auto& [name, view] : tensors) file.write({view.data, view.bytes()});
  file.commit();
}

void write_safetensors(const std::filesystem::path& path,
                       const std::map<std::string, ConstTensorView>& tensors,
                       const std::map<std::string, std::string>& metadata) {
  StagedFile file(path);
  write_safetensors(file, tensors, metadata);
}

}  // namespace upmoe
