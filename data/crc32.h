#pragma once
// The checksum of token files: CRC-32 as in zlib and Python's zlib.crc32, which data/tokenize.py uses.
// (Checkpoints use CRC-32C, crc32c in shard_store.h.)

#include <cstddef>
#include <cstdint>

namespace upmoe {

// `before`: the checksum of what lies before, 0 at the start.
std::uint32_t crc32(const void* data, std::size_t bytes, std::uint32_t before = 0);

}  // namespace upmoe
