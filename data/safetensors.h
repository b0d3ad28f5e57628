#pragma once
// The safetensors format: a JSON header, then raw tensors. A header is hostile input: every size is checked
// before anything is allocated or mapped. Errors: Error(kBadInput) naming file and tensor.

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kernels/core/tensor.h"

namespace upmoe {

struct SafetensorsEntry {
  std::string name;
  std::string dtype;  // as in the file: "BF16", "F32", "F16", ...
  std::vector<std::int64_t> shape;
  std::uint64_t begin = 0, end = 0;  // byte offsets from the start of the data section
};

struct SafetensorsHeader {
  std::vector<SafetensorsEntry> entries;  // in data order
  std::map<std::string, std::string> metadata;
  std::uint64_t data_begin = 0;  // file offset of the data section
};

// Parses and validates a header given as bytes; `file_bytes` is the length of the whole file.
SafetensorsHeader parse_safetensors_header(std::span<const std::byte> bytes, std::uint64_t file_bytes,
                                           const std::string& where);
// The bytes that precede the data: length word and JSON, padded to 8. Entries' offsets are assigned in their order.
std::string make_safetensors_header(std::vector<SafetensorsEntry>& entries,
                                    const std::map<std::string, std::string>& metadata);

class PosixFile;

// One open file, read by pieces (pread: thread-safe, never the whole file in memory).
class SafetensorsFile {
 public:
  explicit SafetensorsFile(const std::filesystem::path& path);
  ~SafetensorsFile();
  SafetensorsFile(SafetensorsFile&&) noexcept;
  SafetensorsFile(const SafetensorsFile&) = delete;
  const SafetensorsHeader& header() const { return header_; }
  const SafetensorsEntry* find(const std::string& name) const;  // null when absent
  const std::filesystem::path& path() const { return path_; }
  // Raw bytes [offset, offset + out.size()) of a tensor, in the file's dtype.
  void read(const SafetensorsEntry& entry, std::uint64_t offset, std::span<std::byte> out) const;

 private:
  std::filesystem::path path_;
  std::unique_ptr<PosixFile> file_;
  SafetensorsHeader header_;
  std::map<std::string, std::size_t> index_;
};

// Writes a whole small file at once, which appears when it is complete (data/staged_directory.h). Values:
// fp32, bf16, fp64, int32 or int64 views.
void write_safetensors(const std::filesystem::path& path,
                       const std::map<std::string, ConstTensorView>& tensors,
                       const std::map<std::string, std::string>& metadata = {{"format", "pt"}});
class StagedFile;
// The same into a file that was opened, which it commits.
void write_safetensors(StagedFile& file, const std::map<std::string, ConstTensorView>& tensors,
                       const std::map<std::string, std::string>& metadata = {{"format", "pt"}});

}  // namespace upmoe
