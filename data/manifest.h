#pragma once
// manifest.json of a shard store: which bytes of which files are which part of which tensor.

#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "parallel/layout.h"

namespace upmoe {

struct StoredFile {
  std::string name;
  std::uint64_t bytes = 0;
  std::uint32_t crc = 0;
};

struct StoredPiece {         // boxes of a tensor, one behind the other
  std::size_t file = 0;      // index into Manifest::files
  std::string dataset;       // path inside the file
  std::uint64_t offset = 0;  // of the first element, in bytes from the start of the file
  std::vector<Box> boxes;
};

struct StoredTensor {
  Shape shape;
  DType dtype = DType::kF32;
  std::vector<StoredPiece> pieces;
};

struct Manifest {
  std::string run = "{}";  // JSON object of the writer
  std::vector<StoredFile> files;
  std::map<std::pair<std::string, std::string>, StoredTensor> tensors;  // by (name, kind)
};

// Undamaged, and of a format that this program does not read.
class FormatError : public Error {
 public:
  explicit FormatError(const std::string& message) : Error(ExitCode::kBadInput, message) {}
};

std::string manifest_json(const Manifest& manifest);
// Checks format, own checksum, names, and that every tensor's boxes lie inside it and cover it exactly once
// by count. Throws Error(kBadInput), of another format FormatError.
Manifest parse_manifest(const std::string& text, const std::string& where);

// What one rank wrote, as text for the other ranks: a manifest with its one file.
std::string shard_json(const Manifest& shard);
Manifest parse_shard(const std::string& text);
void merge(Manifest& whole, const Manifest& shard);

}  // namespace upmoe
