#include "kernels/ops/transfer.h"

#include "kernels/cuda/runtime/stream.cuh"
#include "kernels/ops/backend.h"

namespace upmoe::cuda {

void download(Exec& ex, TensorView host, ConstTensorView device) {
  CudaStream& stream = stream_of(ex);
  if (host.bytes() > 0)
    check(cudaMemcpyAsync(host.data, device.data, host.bytes(), cudaMemcpyDefault, stream.raw()));
  stream.synchronize();
}

void upload(Exec& ex, TensorView device, ConstTensorView host) {
  if (host.bytes() > 0)
    check(cudaMemcpyAsync(device.data, host.data, host.bytes(), cudaMemcpyDefault, stream_of(ex).raw()));
}

}  // namespace upmoe::cuda
