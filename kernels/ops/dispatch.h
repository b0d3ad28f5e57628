#pragma once
// The one switch from a checked op entry to a backend.

#include <utility>

#include "kernels/core/exec.h"

namespace upmoe::ops {

template <class Cpu, class Cuda, class... Args>
void dispatch(Exec& ex, Cpu cpu, Cuda cuda, Args&&... args) {
  switch (ex.device.type) {
    case DeviceType::kCpu:
      if (ex.comm != nullptr) ex.comm->poll();
      return cpu(ex, std::forward<Args>(args)...);
    case DeviceType::kCuda:
      return cuda(ex, std::forward<Args>(args)...);
    case DeviceType::kDry:
      return;  // checked and booked, not computed
  }
}

}  // namespace upmoe::ops
