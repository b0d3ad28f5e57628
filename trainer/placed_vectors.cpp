#include "trainer/placed_vectors.h"

#include "kernels/ops/transfer.h"

namespace upmoe {

void PlacedVectors::place(Exec& ex, std::span<const Part> parts) {
  std::int64_t total = 0, at = 0;
  for (const Part& p : parts) total += static_cast<std::int64_t>(p.values.size());
  const bool here = ex.device.type == DeviceType::kCpu;
  const std::size_t bytes = static_cast<std::size_t>(total) * sizeof(std::int32_t);
  if (!here && on_device_.bytes() < bytes) on_device_ = Buffer::allocate(ex.device, bytes, "tokens");
  for (const Part& p : parts) {
    const auto n = static_cast<std::int64_t>(p.values.size());
    const ConstTensorView on_host = host_view(p.values.data(), {n});
    p.view = on_host;
    if (here) continue;
    const TensorView placed = on_device_.view({total}, DType::kI32).rows(at, at + n);
    ops::upload(ex, placed, on_host);
    p.view = placed;
    at += n;
  }
}

}  // namespace upmoe
