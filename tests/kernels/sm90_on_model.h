#pragma once
// What tests of the experts' Hopper kernels share: a run on the model of the hardware, and memory with guards.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels/cuda/sm90/expert_pipeline.cuh"

namespace upmoe {

// Memory that a kernel writes, between guards; NaNs where it has not written.
template <class T>
class Guarded {
 public:
  explicit Guarded(std::size_t n) : memory_(n + 2 * kGuard) {
    std::fill(memory_.begin(), memory_.end(), poison());
  }
  Guarded(const Guarded&) = default;
  Guarded& operator=(const Guarded& other) {  // in its place, which a kernel was told
    std::copy(other.memory_.begin(), other.memory_.end(), memory_.begin());
    return *this;
  }
  T* data() { return memory_.data() + kGuard; }
  double operator[](std::size_t i) const { return static_cast<double>(to_float(memory_[kGuard + i])); }
  bool operator==(const Guarded& other) const {
    return std::memcmp(memory_.data(), other.memory_.data(), memory_.size() * sizeof(T)) == 0;
  }
  bool guards_stand() const {
    const auto bad = [](const T& x) { return std::memcmp(&x, &kPoison, sizeof x) != 0; };
    return std::none_of(memory_.begin(), memory_.begin() + kGuard, bad) &&
           std::none_of(memory_.end() - kGuard, memory_.end(), bad);
  }

 private:
  static constexpr std::ptrdiff_t kGuard = 8192;
  static constexpr std::uint32_t kPoison = 0x7fc17fc1u;
  static T poison() {
    T value;
    std::memcpy(static_cast<void*>(&value), &kPoison, sizeof value);
    return value;
  }
  std::vector<T> memory_;
};

// Two clusters of a kernel's blocks; a mistake that the model finds fails the test with its words.
template <class Body>
void run_on_model(std::size_t shared_bytes, int cluster, sm90_twin::When when, std::uint64_t seed,
                  const Body& body) {
  sm90_twin::Launch launch;
  launch.blocks = 2 * static_cast<unsigned>(cluster);
  launch.threads = cuda::sm90::kBlockThreads;
  launch.shared_bytes = shared_bytes;
  launch.cluster = static_cast<unsigned>(cluster);
  launch.when = when;
  launch.seed = seed;
  try {
    sm90_twin::run(launch, body);
  } catch (const sm90_twin::Mistake& mistake) {
    FAIL() << mistake.words;
  }
}

}  // namespace upmoe
