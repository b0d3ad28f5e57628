#pragma once
// Ranks on pretended GPUs, and what their NCCL was asked for.

#include <gtest/gtest.h>

#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "parallel/thread_comm.h"
#include "tests/parallel/on_gpu.h"
#include "tests/support/fake_cuda/fake_cuda.h"

namespace upmoe {

inline void on_gpus(int ranks, const std::function<void(Communicator&)>& body) {
  run_in_threads(ranks, [&](Communicator& world) {
    gpu::use(world.rank());
    OnGpu on_gpu(make_nccl_communicator(world.split(0, world.rank())));
    body(on_gpu);
  });
}

inline TensorView view(std::vector<float>& v) {
  return host_view(v.data(), {static_cast<std::int64_t>(v.size())});
}
inline ConstTensorView view(const std::vector<float>& v) {
  return host_view(v.data(), {static_cast<std::int64_t>(v.size())});
}

// How often each call was made by rank 0, and how many bytes it named.
inline std::map<std::string, std::pair<int, std::size_t>> of_rank_0() {
  std::map<std::string, std::pair<int, std::size_t>> sums;
  for (const fake_cuda::NcclCall& call : fake_cuda::take_nccl_calls())
    if (call.rank == 0) {
      ++sums[call.name].first;
      sums[call.name].second += call.bytes;
    }
  return sums;
}

class Nccl : public testing::Test {
 protected:
  void SetUp() override { fake_cuda::take_nccl_calls(); }
  void TearDown() override {
    set_nccl_error_handler(nullptr);
    fake_cuda::set_nccl_at_once(4);
    fake_cuda::set_nccl_version(22809);
    fake_cuda::set_delays(0);
  }
};
using NcclDeathTest = Nccl;

}  // namespace upmoe
