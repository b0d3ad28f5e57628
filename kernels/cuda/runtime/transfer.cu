#include "kernels/ops/transfer.h"

#include <cstring>

#include "kernels/cuda/runtime/stream.cuh"
#include "kernels/ops/backend.h"

namespace upmoe::cuda {

void download(Exec& ex, TensorView host, ConstTensorView device) {
  CudaStream& stream = stream_of(ex);
  const std::size_t bytes = host.bytes();
  std::byte* to = bytes <= CudaStream::kStaging ? stream.staging() : host.data;  // the host waits once
  if (bytes > 0) check(cudaMemcpyAsync(to, device.data, bytes, cudaMemcpyDefault, stream.raw()));
  stream.synchronize();
  if (bytes > 0 && to != host.data) std::memcpy(host.data, to, bytes);
}

void upload(Exec& ex, TensorView device, ConstTensorView host) {
  if (host.bytes() > 0)
    check(cudaMemcpyAsync(device.data, host.data, host.bytes(), cudaMemcpyDefault, stream_of(ex).raw()));
}

}  // namespace upmoe::cuda
