#include <array>
#include <cstring>

#include "data/shard_store.h"

#ifdef __SSE4_2__
#include <nmmintrin.h>
#endif

namespace upmoe {

namespace {

#ifndef __SSE4_2__
constexpr std::array<std::uint32_t, 256> make_table() {
  std::array<std::uint32_t, 256> table{};
  for (std::uint32_t i = 0; i < 256; ++i) {
    std::uint32_t c = i;
    for (int bit = 0; bit < 8; ++bit) c = (c & 1u) != 0 ? (c >> 1) ^ 0x82F63B78u : c >> 1;
    table[i] = c;
  }
  return table;
}
#endif

}  // namespace

std::uint32_t crc32c(const void* data, std::size_t bytes, std::uint32_t seed) {
  const auto* p = static_cast<const unsigned char*>(data);
  std::uint32_t crc = ~seed;
#ifdef __SSE4_2__
  std::uint64_t wide = crc;
  for (; bytes >= 8; bytes -= 8, p += 8) {
    std::uint64_t word = 0;
    std::memcpy(&word, p, 8);
    wide = _mm_crc32_u64(wide, word);
  }
  crc = static_cast<std::uint32_t>(wide);
  for (; bytes > 0; --bytes, ++p) crc = _mm_crc32_u8(crc, *p);
#else
  static constexpr std::array<std::uint32_t, 256> table = make_table();
  for (; bytes > 0; --bytes, ++p) crc = table[(crc ^ *p) & 0xffu] ^ (crc >> 8);
#endif
  return ~crc;
}

}  // namespace upmoe
