#pragma once
// Two checksums. Checkpoints and reports use CRC-32C, which processors compute. Token files use CRC-32,
// because data/tokenize.py makes them with what Python's standard library has (zlib.crc32).

#include <cstddef>
#include <cstdint>

namespace upmoe {

// `before`: the checksum of what lies before, 0 at the start.
std::uint32_t crc32(const void* data, std::size_t bytes, std::uint32_t before = 0);   // as in zlib
std::uint32_t crc32c(const void* data, std::size_t bytes, std::uint32_t before = 0);  // Castagnoli

}  // namespace upmoe
