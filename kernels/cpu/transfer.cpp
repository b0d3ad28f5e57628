#include "kernels/ops/transfer.h"

#include <cstring>

#include "kernels/ops/backend.h"

namespace upmoe::cpu {

void download(Exec&, TensorView host, ConstTensorView device) {
  if (host.data != device.data && host.bytes() > 0) std::memcpy(host.data, device.data, host.bytes());
}

void upload(Exec&, TensorView device, ConstTensorView host) {
  if (host.data != device.data && host.bytes() > 0) std::memcpy(device.data, host.data, host.bytes());
}

}  // namespace upmoe::cpu
