#pragma once
// By which kernels something is computed, where a device has several.

#include <cstdint>

namespace upmoe {

// The routed experts.
enum class ExpertsPath : std::uint8_t {
  kAuto,     // kStreams, until a record shows kFused right and faster
  kStreams,  // gathers, a product for each expert on several streams, SwiGLU: one after the other
  kFused,    // kernels that do several of these at once (kernels/ops/experts.h), where they can
};

// Loss and gradient over a whole vocabulary.
enum class CrossEntropyPath : std::uint8_t {
  kAuto,      // kPortable, until a record shows kClusters right and faster
  kPortable,  // a block for each row, which reads it twice
  kClusters,  // a cluster of blocks for each row, which keeps it between the two, where they can
};

}  // namespace upmoe
