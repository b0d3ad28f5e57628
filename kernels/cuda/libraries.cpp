// Which libraries a build with CUDA computes with.

#include "kernels/core/gpu.h"
#include "kernels/cuda/library/cublaslt.cuh"
#include "kernels/cuda/library/cudnn_sdpa.h"

namespace upmoe {

namespace {

std::string dotted(std::size_t version) {
  return fmt::format("{}.{}.{}", version / 10000, version / 100 % 100, version % 100);
}

}  // namespace

std::vector<std::pair<std::string, std::string>> gpu::libraries() {
  const std::size_t cudnn = cuda::cudnn_version();
  return {{"cuBLASLt", dotted(cuda::cublaslt_version())},
          {"cuDNN", cudnn == 0 ? "this program was built without it" : dotted(cudnn)}};
}

}  // namespace upmoe
