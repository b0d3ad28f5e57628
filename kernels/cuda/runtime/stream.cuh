#pragma once
// What the .cu files share on the host: the stream behind an Exec, errors of the CUDA runtime, and the
// findings through which kernels report bad input.

#include <cuda_runtime.h>

#include <memory>
#include <source_location>
#include <vector>

#include "kernels/core/exec.h"

namespace upmoe::cuda {

// What a kernel may find wrong in its input.
enum class Finding : int { kToken, kTarget, kLogit, kIndex };
constexpr int kFindings = 4;

// On the device, one word for each kind: row << 32 | value of the lowest row with one; all ones while there is none.
using FindingWords = unsigned long long*;

// Throws Error(kDevice) with the runtime's words and the call's place.
void check(cudaError_t status, std::source_location where = std::source_location::current());

class GemmLibrary;  // cublaslt.cu
class SdpaLibrary;  // cudnn_sdpa.cpp

class CudaStream final : public Stream {
 public:
  CudaStream();  // of the calling thread's GPU
  ~CudaStream() override;
  void synchronize() override;

  cudaStream_t raw() const { return raw_; }
  FindingWords findings() const { return findings_; }
  // The vocabulary and the number of experts of the last op that may report, for the words of the report.
  void limit(Finding kind, std::int64_t value) { limits_[static_cast<int>(kind)] = value; }
  GemmLibrary& gemm();
  SdpaLibrary& sdpa();  // in a build with cuDNN

 private:
  void report();

  cudaStream_t raw_ = nullptr;
  FindingWords findings_ = nullptr, seen_ = nullptr;  // on the device; on the host, pinned
  std::int64_t limits_[kFindings] = {};
  std::shared_ptr<GemmLibrary> gemm_;
  std::shared_ptr<SdpaLibrary> sdpa_;
};

// The stream of an op. An Exec for a GPU always has one.
CudaStream& stream_of(const Exec& ex);

}  // namespace upmoe::cuda
