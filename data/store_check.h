#pragma once
// Reading a whole store to compare its checksums, divided over ranks and into turns.

#include <chrono>
#include <optional>

#include "data/posix_file.h"
#include "data/shard_store.h"

namespace upmoe {

// Throws Error(kBadInput) when a file's checksum is not the one that the manifest has.
void require_checksum(const std::filesystem::path& file, std::uint32_t found, std::uint32_t expected);

// The files part, part + parts, part + 2 parts ... of a store.
class StoreCheck {
 public:
  StoreCheck(const ShardStore& store, int part, int parts);  // `store` outlives this
  // Reads on for about `at_most`, and at least one block. False once everything was read.
  // Throws like ShardStore::verify.
  bool advance(std::chrono::milliseconds at_most);

 private:
  const ShardStore& store_;
  std::size_t next_, stride_;
  std::optional<FileChecksum> reading_;
};

}  // namespace upmoe
