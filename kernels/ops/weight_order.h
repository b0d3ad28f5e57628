#pragma once
// The order of a router's weights among tokens, the same text for every device.

#include <bit>
#include <cstdint>

namespace upmoe {

// The bits of a compared weight below this one are 0.
inline constexpr int kLeastComparedBit = 11;

// Two tokens with the same past have the same weight, but for the rounding of products whose order of sums the layout
// decides. So weights are compared with 12 bits behind their leading one, rounded to the nearest: then such tokens are
// equal, and their places decide in every layout alike.
constexpr float compared_weight(float weight) {
  constexpr std::uint32_t unit = 1u << kLeastComparedBit;
  return std::bit_cast<float>((std::bit_cast<std::uint32_t>(weight) + unit / 2) & ~(unit - 1));
}

}  // namespace upmoe
