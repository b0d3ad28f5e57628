#pragma once
// A step's vectors of whole numbers (tokens, targets, positions ..), made on the host, where the device's ops read
// them.

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/core/exec.h"
#include "kernels/core/memory.h"

namespace upmoe {

class PlacedVectors {
 public:
  struct Part {
    const std::vector<std::int32_t>& values;
    ConstTensorView& view;
  };
  // Gives each part its view, of int32 and one dim: on the host the vector itself, else a piece of one buffer that
  // grows where it must. Views are valid until the next call, and as long as this and the vectors stand unchanged.
  void place(Exec& ex, std::span<const Part> parts);

 private:
  Buffer on_device_;
};

}  // namespace upmoe
