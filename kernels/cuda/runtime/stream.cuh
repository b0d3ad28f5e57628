#pragma once
// What kernels/cuda shares on the host: the stream behind an Exec, and errors of the CUDA runtime.

#include <cuda_runtime.h>

#include <map>
#include <memory>
#include <optional>
#include <source_location>
#include <string>
#include <typeindex>

#include "kernels/core/exec.h"
#include "kernels/cuda/runtime/findings.cuh"

namespace upmoe::cuda {

// Throws Error(kDevice) with the runtime's words and the call's place.
void check(cudaError_t status, std::source_location where = std::source_location::current());

class CudaStream final : public Stream {
 public:
  CudaStream();  // of the calling thread's GPU
  ~CudaStream() override;
  void synchronize() override;

  cudaStream_t raw() const { return raw_; }
  // Pinned memory of the host for what the host reads of the stream: a copy to other memory would hold it by itself.
  static constexpr std::size_t kStaging = std::size_t{256} << 10;
  std::byte* staging();
  int sm() const { return sm_; }  // the GPU's compute capability: 90 is 9.0
  int multiprocessors() const { return multiprocessors_; }
  const std::string& device() const { return device_; }  // its name: "NVIDIA H200"
  FindingWords findings() const { return findings_->words(); }
  void limit(Finding kind, std::int64_t value) { findings_->limit(kind, value); }

  // The T that belongs to this stream, made of it at first use and gone with it: where a library keeps its plans.
  template <class T>
  T& kept() {
    std::shared_ptr<void>& one = kept_[typeid(T)];
    if (one == nullptr) one = std::make_shared<T>(*this);
    return *static_cast<T*>(one.get());
  }

 private:
  cudaStream_t raw_ = nullptr;
  int sm_ = 0, multiprocessors_ = 0;
  std::optional<Findings> findings_;  // always there
  std::byte* staging_ = nullptr;      // from its first use on
  std::map<std::type_index, std::shared_ptr<void>> kept_;
  std::string device_;
};

// The stream of an op. An Exec for a GPU always has one.
CudaStream& stream_of(const Exec& ex);

}  // namespace upmoe::cuda
