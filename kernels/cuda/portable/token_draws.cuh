#pragma once
// A token's draws, on the device.

#include <cstdint>

#include "kernels/cuda/runtime/launch.cuh"
#include "kernels/ops/router_draws.h"

namespace upmoe::cuda {

struct Draws {
  std::uint64_t key, first;
  std::uint32_t layer;
  const std::int32_t* place;
  // Its number in the whole run.
  __device__ std::uint64_t token(std::int64_t t) const {
    return first + static_cast<std::uint64_t>(place[t]);
  }
};
inline Draws on_device(const TokenDraws& draws) {
  return {draws.key, draws.first, draws.layer, draws.place_T.as<std::int32_t>()};
}

}  // namespace upmoe::cuda
