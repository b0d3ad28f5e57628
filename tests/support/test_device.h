#pragma once
// On which device the op tests run: the CPU, or the GPU (a real one or a pretended one, as the test is
// linked) when the environment variable UPMOE_TEST_DEVICE says cuda.

#include <cstdlib>
#include <memory>
#include <string_view>

#include "kernels/core/exec.h"
#include "kernels/core/gpu.h"
#include "kernels/ops/transfer.h"

namespace upmoe::test {

inline DeviceType test_device() {
  static const char* name = std::getenv("UPMOE_TEST_DEVICE");
  return name != nullptr && std::string_view(name) == "cuda" ? DeviceType::kCuda : DeviceType::kCpu;
}
inline bool on_gpu() {
  return test_device() == DeviceType::kCuda;
}

// An Exec of the test device, without scratch; its stream is that of all ops of the test program.
inline Exec test_exec() {
  Exec ex;
  ex.device.type = test_device();
  if (on_gpu()) {
    static const std::unique_ptr<Stream> stream = [] {
      gpu::use(0);
      return gpu::make_stream();
    }();
    ex.stream = stream.get();
  }
  return ex;
}

// Waits for the ops so far and throws what they found wrong; the CPU's ops throw by themselves.
inline void finish_ops() {
  if (on_gpu()) test_exec().stream->synchronize();
}

}  // namespace upmoe::test
