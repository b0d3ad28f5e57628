#pragma once
// Boxes of a tensor, the same on every machine.

#include "kernels/core/philox.h"
#include "parallel/layout.h"

namespace upmoe::test {

// Every extent is at least `least` (0 or 1).
inline Box random_box(const Shape& shape, std::uint64_t seed, std::int64_t least) {
  Box box = whole(shape);
  for (int d = 0; d < shape.rank; ++d) {
    const auto bits = philox(seed, static_cast<std::uint64_t>(d));
    const auto i = static_cast<std::size_t>(d);
    box.offset.dim[i] = bits[0] % shape[d];
    box.extent.dim[i] = least + bits[1] % (shape[d] - box.offset[d] + 1 - least);
  }
  return box;
}

}  // namespace upmoe::test
