#pragma once
// Found before the file of the same name that launches on a GPU: clusters on the model of the hardware, behind what the
// stream was given. Nobody is there to be told of a mistake: the program ends with its words.

#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>

#include "tests/support/fake_cuda/sm90_emulation.h"

namespace upmoe::cuda::sm90 {

struct ClusterLaunch {
  cudaStream_t stream;
  int blocks, threads, cluster;
  std::size_t shared_bytes;
};

template <class... Parameters, class... Arguments>
void launch_clusters(const ClusterLaunch& l, void (*kernel)(Parameters...), const Arguments&... arguments) {
  if (fake_cuda::is_watched()) {
    fake_cuda::Ranges reads, writes;
    (fake_cuda::add_pointer(arguments, reads, writes), ...);
    fake_cuda::touched(l.stream, "a kernel", reads, writes);
  }
  sm90_twin::Launch launch;
  launch.blocks = static_cast<unsigned>(l.blocks);
  launch.threads = static_cast<unsigned>(l.threads);
  launch.shared_bytes = l.shared_bytes;
  launch.cluster = static_cast<unsigned>(l.cluster);
  fake_cuda::enqueue(l.stream, [launch, kernel, ... values = Arguments(arguments)] {
    try {
      sm90_twin::run(launch, [&] { kernel(values...); });
    } catch (const sm90_twin::Mistake& mistake) {
      std::fprintf(stderr, "a kernel for Hopper: %s\n", mistake.words.c_str());
      std::abort();
    }
  });
}

}  // namespace upmoe::cuda::sm90
