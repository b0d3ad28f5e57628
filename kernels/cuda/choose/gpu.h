#pragma once
// What a choice of kernels knows of the GPU.

#include <string_view>

namespace upmoe::cuda {

struct Gpu {
  int sm = 0;                    // compute capability: 90 is 9.0
  bool cudnn = false;            // this program was built with cuDNN
  std::string_view device = {};  // by its name: "NVIDIA H200"
};

}  // namespace upmoe::cuda
