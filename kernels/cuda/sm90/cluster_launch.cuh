#pragma once
// How kernels of this folder are launched: in clusters, with more shared memory than a kernel has unless it asks. The
// file of the same path under tests/support/fake_cuda runs them on the model of the hardware.

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace upmoe::cuda::sm90 {

struct ClusterLaunch {
  cudaStream_t stream;
  int blocks, threads, cluster;
  std::size_t shared_bytes;
};

inline void check_launch(cudaError_t status, const ClusterLaunch& l) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("launch of a kernel for Hopper: ") + cudaGetErrorString(status) +
                             " (" + std::to_string(l.blocks) + " blocks of " + std::to_string(l.threads) +
                             " threads in clusters of " + std::to_string(l.cluster) + ", each with " +
                             std::to_string(l.shared_bytes) + " bytes of shared memory)");
}

template <class... Parameters, class... Arguments>
void launch_clusters(const ClusterLaunch& l, void (*kernel)(Parameters...), const Arguments&... arguments) {
  check_launch(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(l.shared_bytes)),
               l);
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(l.blocks);
  config.blockDim = static_cast<unsigned>(l.threads);
  config.dynamicSmemBytes = l.shared_bytes;
  config.stream = l.stream;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(l.cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  check_launch(cudaLaunchKernelEx(&config, kernel, arguments...), l);
}

}  // namespace upmoe::cuda::sm90
