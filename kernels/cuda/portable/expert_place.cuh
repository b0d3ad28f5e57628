#pragma once
// Where an expert stands among all of them by falling number of rows, the first one first among equals: a pure function
// of their offsets, for device and host alike.

#include <cuda_runtime.h>

#include <cstdint>

namespace upmoe::cuda {

__host__ __device__ constexpr int place_by_rows(int expert, const std::int32_t* offset, int experts) {
  const std::int32_t mine = offset[expert + 1] - offset[expert];
  int place = 0;
  for (int other = 0; other < experts; ++other) {
    const std::int32_t theirs = offset[other + 1] - offset[other];
    place += theirs > mine || (theirs == mine && other < expert) ? 1 : 0;
  }
  return place;
}

}  // namespace upmoe::cuda
