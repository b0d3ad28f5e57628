#include "kernels/cuda/runtime/findings.cuh"

#include "kernels/cuda/runtime/stream.cuh"
#include "kernels/ops/findings.h"

namespace upmoe::cuda {

namespace {

constexpr std::size_t kBytes = kFindings * sizeof(unsigned long long);

}  // namespace

Findings::Findings(cudaStream_t stream) : stream_(stream) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, kBytes));
  on_device_ = static_cast<FindingWords>(memory);
  check(cudaHostAlloc(&memory, kBytes, cudaHostAllocDefault));
  on_host_ = static_cast<FindingWords>(memory);
  check(cudaMemsetAsync(on_device_, 0xff, kBytes, stream_));
}

Findings::~Findings() {
  cudaFree(on_device_);
  cudaFreeHost(on_host_);
}

void Findings::fetch() {
  check(cudaMemcpyAsync(on_host_, on_device_, kBytes, cudaMemcpyDefault, stream_));
}

void Findings::report() {
  for (int kind = 0; kind < kFindings; ++kind) {
    if (on_host_[kind] == ~0ull) continue;
    check(cudaMemsetAsync(on_device_, 0xff, kBytes, stream_));  // told once
    fail_with(static_cast<Finding>(kind), on_host_[kind]);
  }
}

void Findings::fail_with(Finding kind, unsigned long long word) const {
  const auto row = static_cast<std::int64_t>(word >> 32);
  const auto value = static_cast<std::int32_t>(static_cast<std::uint32_t>(word));
  const std::int64_t limit = limits_[static_cast<int>(kind)];
  switch (kind) {
    case Finding::kToken:
      fail_token(value, row, limit);
    case Finding::kTarget:
      fail_target(value, row, limit);
    case Finding::kLogit:
      fail_logit(row, value, "not finite");
    case Finding::kIndex:
      fail_index(value, row, limit);
  }
}

}  // namespace upmoe::cuda
