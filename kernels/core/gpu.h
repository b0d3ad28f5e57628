#pragma once
// What lies beneath the ops on a GPU: devices, memory, streams. Defined in kernels/cuda; a build without CUDA
// links refusals that say so (Error(kDevice)).

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/core/exec.h"

namespace upmoe::gpu {

bool is_built();                 // this program has a CUDA backend
int count();                     // GPUs that this process may use; 0 without a driver, never an error
std::string why_none();          // in words, when count() is 0
std::string name_of(int index);  // "NVIDIA H200, compute capability 9.0, 139.8 GiB"

std::string pci_id(int index);  // which piece of hardware of this host it is

// Makes GPU `index` the calling thread's. Throws Error(kDevice) when there is none of that number, when its
// compute capability is not one that this program was compiled for, or when the driver refuses.
void use(int index);

// A stream of the calling thread's GPU. synchronize() waits for the host's sake and throws what the device
// found wrong meanwhile: a token out of range (kBadInput), a router logit that is not finite (kNumeric), a
// fault (kDevice).
std::unique_ptr<Stream> make_stream();

// Between memory of the device, behind the stream's work so far.
void copy(Stream& stream, std::byte* to, const std::byte* from, std::size_t bytes);

// Zero-filled, 256-byte aligned. Throws Error(kFailure) with request, free and total memory, and the largest
// of what this process holds, by name.
std::byte* allocate(std::size_t bytes, std::string_view what);
void release(std::byte* memory) noexcept;

// Address space that receives memory as it grows and never moves. bytes is rounded up to the device's
// granularity.
class Reservation {
 public:
  explicit Reservation(std::size_t bytes, std::string_view what);
  ~Reservation();
  Reservation(const Reservation&) = delete;
  std::byte* base() const { return base_; }
  std::size_t committed() const { return committed_; }
  void commit(std::size_t bytes);  // at least so much from the base on; throws as allocate() does

 private:
  std::byte* base_ = nullptr;
  std::size_t reserved_ = 0, committed_ = 0;
  std::vector<std::size_t> pieces_;  // as they were committed
  std::string what_;
};

}  // namespace upmoe::gpu
