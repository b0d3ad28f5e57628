#pragma once
// The order of a router's weights among tokens, the same text for every device.

#include <bit>
#include <cstdint>

#include "kernels/ops/router_noise.h"

namespace upmoe {

// Two tokens with the same past have the same weight, but for the rounding of products whose order of sums the layout
// decides. So weights are compared with 12 bits behind their leading one, rounded to the nearest: then such tokens are
// equal, and their places decide in every layout alike.
UPMOE_EVERYWHERE inline float compared_weight(float weight) {
  return std::bit_cast<float>((std::bit_cast<std::uint32_t>(weight) + 0x400u) & ~0x7FFu);
}

}  // namespace upmoe
