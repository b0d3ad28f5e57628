#pragma once
// By which kernels the routed experts are computed, where a device has several.

#include <cstdint>

namespace upmoe {

enum class ExpertsPath : std::uint8_t {
  kAuto,     // kStreams, until a record shows kFused right and faster
  kStreams,  // gathers, a product for each expert on several streams, SwiGLU: one after the other
  kFused,    // kernels that do several of these at once (kernels/ops/experts.h), where they can
};

}  // namespace upmoe
