#pragma once
// What kernels find wrong in their input: a word on the device for each kind, looked at when the host next waits
// for the stream.

#include <cuda_runtime.h>

#include <cstdint>

namespace upmoe::cuda {

enum class Finding : int { kToken, kTarget, kLogit, kIndex };
constexpr int kFindings = 4;

// One for each kind: row << 32 | value of the lowest row with one; all ones while there is none.
using FindingWords = unsigned long long*;

// Those of one stream.
class Findings {
 public:
  explicit Findings(cudaStream_t stream);
  ~Findings();
  Findings(const Findings&) = delete;

  FindingWords words() const { return on_device_; }
  // The vocabulary and the number of experts of the last op that may report, for the words of the report.
  void limit(Finding kind, std::int64_t value) { limits_[static_cast<int>(kind)] = value; }
  void fetch();   // behind the stream's work so far
  void report();  // once the stream has come to the fetch: throws what was found, and forgets it

 private:
  void fail_with(Finding kind, unsigned long long word) const;

  cudaStream_t stream_;
  FindingWords on_device_ = nullptr, on_host_ = nullptr;  // the host's are pinned
  std::int64_t limits_[kFindings] = {};
};

}  // namespace upmoe::cuda
