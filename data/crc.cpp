#include "data/crc.h"

#include <array>
#include <cstring>

#ifdef __SSE4_2__
#include <nmmintrin.h>
#endif

namespace upmoe {

namespace {

// table[k][b]: what byte b does to the checksum k bytes later, so that eight bytes are taken at once.
constexpr std::array<std::array<std::uint32_t, 256>, 8> make_tables(std::uint32_t polynomial) {
  std::array<std::array<std::uint32_t, 256>, 8> tables{};
  for (std::uint32_t i = 0; i < 256; ++i) {
    std::uint32_t c = i;
    for (int bit = 0; bit < 8; ++bit) c = (c & 1u) != 0 ? (c >> 1) ^ polynomial : c >> 1;
    tables[0][i] = c;
  }
  for (std::size_t k = 1; k < 8; ++k)
    for (std::size_t i = 0; i < 256; ++i)
      tables[k][i] = (tables[k - 1][i] >> 8) ^ tables[0][tables[k - 1][i] & 0xffu];
  return tables;
}

template <std::uint32_t kPolynomial>
struct ByTable {
  static constexpr auto kTables = make_tables(kPolynomial);
  static std::uint32_t word(std::uint32_t crc, std::uint64_t word) {
    // The checksum so far is xored into the first four bytes; then each byte's effect is looked up by how far it is
    // from the end of the word, and all eight are xored together: CRCs are linear.
    word ^= crc;
    crc = 0;
    for (std::size_t k = 0; k < 8; ++k) crc ^= kTables[7 - k][(word >> (8 * k)) & 0xffu];
    return crc;
  }
  static std::uint32_t byte(std::uint32_t crc, unsigned char b) {
    return kTables[0][(crc ^ b) & 0xffu] ^ (crc >> 8);
  }
};

#ifdef __SSE4_2__
struct Castagnoli {
  static std::uint32_t word(std::uint32_t crc, std::uint64_t word) {
    return static_cast<std::uint32_t>(_mm_crc32_u64(crc, word));
  }
  static std::uint32_t byte(std::uint32_t crc, unsigned char b) { return _mm_crc32_u8(crc, b); }
};
#else
using Castagnoli = ByTable<0x82F63B78u>;
#endif

template <class Steps>
std::uint32_t checksum(const void* data, std::size_t bytes, std::uint32_t before) {
  const auto* p = static_cast<const unsigned char*>(data);
  std::uint32_t crc = ~before;
  for (; bytes >= 8; bytes -= 8, p += 8) {
    std::uint64_t word = 0;
    std::memcpy(&word, p, 8);
    crc = Steps::word(crc, word);
  }
  for (; bytes > 0; --bytes, ++p) crc = Steps::byte(crc, *p);
  return ~crc;
}

}  // namespace

std::uint32_t crc32(const void* data, std::size_t bytes, std::uint32_t before) {
  return checksum<ByTable<0xEDB88320u>>(data, bytes, before);
}

std::uint32_t crc32c(const void* data, std::size_t bytes, std::uint32_t before) {
  return checksum<Castagnoli>(data, bytes, before);
}

}  // namespace upmoe
