#pragma once
// What the parts of the pretended CUDA share.

#include <atomic>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>

#include "tests/support/fake_cuda/cuda.h"

namespace fake_cuda {

inline std::uint64_t seed_of_environment() {
  const char* text = std::getenv("UPMOE_FAKE_DELAYS");
  return text != nullptr ? std::strtoull(text, nullptr, 10) : 0;
}

struct World {
  std::mutex mutex;
  int devices = 8, major = 9, minor = 0;
  std::size_t memory = std::size_t{64} << 30, used = 0;
  std::map<void*, std::size_t> allocations, pinned;
  std::map<CUmemGenericAllocationHandle, std::size_t> handles;
  std::map<CUdeviceptr, CUmemGenericAllocationHandle> mapped;
  CUmemGenericAllocationHandle next_handle = 1;
  std::map<std::string, std::pair<int, int>> failures;  // the error and how often
  std::atomic<std::uint64_t> delays{seed_of_environment()};
};
inline World& world() {
  static World w;
  return w;
}

inline thread_local int waits_of_thread = 0;

// The error that a test has planted for this call.
inline cudaError_t planted(const char* call) {
  World& w = world();
  const std::lock_guard lock(w.mutex);
  const auto it = w.failures.find(call);
  if (it == w.failures.end()) return cudaSuccess;
  const auto error = static_cast<cudaError_t>(it->second.first);
  if (--it->second.second == 0) w.failures.erase(it);
  return error;
}

}  // namespace fake_cuda
