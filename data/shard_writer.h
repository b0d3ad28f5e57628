#pragma once
// One rank's file of a shard store while it is written.

#include <cstddef>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "data/direct_file.h"
#include "data/manifest.h"
#include "data/store_writer.h"

namespace upmoe {

// HDF5 gives every piece its place in the file; the values are then written there directly, so that each
// write that the disk refuses is told at once and nothing but the caller's block is held in memory.
class ShardWriter {
 public:
  ShardWriter(const std::filesystem::path& folder, int rank, const std::vector<StorePiece>& pieces);

  void write_values();  // of the pieces that have them
  void put(const StoreBlock& block, std::span<const std::byte> values);
  // Brings the file to disk and reads it again. Throws when an element was written twice or not at all, or
  // when the file holds something else than what was written.
  Manifest finish();

 private:
  // What was written. The values are compared where the caller still has them, their checksum otherwise.
  struct Written {
    std::uint64_t offset = 0, bytes = 0;
    std::uint32_t crc = 0;
    const std::byte* values = nullptr;
  };
  void lay_out();
  void require_whole() const;
  StoredFile read_back() const;

  const std::vector<StorePiece>& pieces_;
  std::string name_;
  std::filesystem::path path_;
  Manifest shard_;
  std::vector<std::uint64_t> offsets_;  // by piece
  std::vector<Written> written_;
  std::optional<DirectFile> file_;
};

}  // namespace upmoe
