#pragma once
// Philox4x32-10 (Salmon et al., SC'11): random bits as a pure function of (key, counter), the same on every
// rank, thread and device. Element i of a tensor uses counter i, so values depend on the global element index
// alone. Ten rounds are the authors' advice; seven are the fewest with which it passes all of BigCrush.

#include <array>
#include <cstdint>
#include <string_view>

namespace upmoe {

using Philox4 = std::array<std::uint32_t, 4>;

template <int Rounds = 10>
constexpr Philox4 philox(std::uint64_t key, std::uint64_t counter_lo, std::uint64_t counter_hi = 0) {
  std::uint32_t k0 = static_cast<std::uint32_t>(key), k1 = static_cast<std::uint32_t>(key >> 32);
  Philox4 c{static_cast<std::uint32_t>(counter_lo), static_cast<std::uint32_t>(counter_lo >> 32),
            static_cast<std::uint32_t>(counter_hi), static_cast<std::uint32_t>(counter_hi >> 32)};
  for (int round = 0; round < Rounds; ++round) {
    const std::uint64_t p0 = std::uint64_t{0xD2511F53u} * c[0];
    const std::uint64_t p1 = std::uint64_t{0xCD9E8D57u} * c[2];
    c = {static_cast<std::uint32_t>(p1 >> 32) ^ c[1] ^ k0, static_cast<std::uint32_t>(p1),
         static_cast<std::uint32_t>(p0 >> 32) ^ c[3] ^ k1, static_cast<std::uint32_t>(p0)};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

// A key for one named use of one seed (FNV-1a over the name), so that two tensors never share a stream.
inline std::uint64_t philox_key(std::uint64_t seed, std::string_view name) {
  std::uint64_t h = 0xcbf29ce484222325ull ^ (seed * 0x9E3779B97F4A7C15ull);
  for (char ch : name) h = (h ^ static_cast<unsigned char>(ch)) * 0x100000001b3ull;
  return h;
}

// Uniform in (0, 1): 23 bits and a half, so that neither 0 nor 1 comes out of the rounding.
constexpr float uniform_from_bits(std::uint32_t bits) {
  return (static_cast<float>(bits >> 9) + 0.5f) * (1.0f / 8388608.0f);
}

}  // namespace upmoe
