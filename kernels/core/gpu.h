#pragma once
// What lies beneath the ops on a GPU: devices, memory, streams. Defined in kernels/cuda; a build without CUDA
// links refusals that say so (Error(kDevice)).

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kernels/core/exec.h"
#include "kernels/core/product_algorithms.h"
#include "kernels/core/reduce_op.h"

namespace upmoe::gpu {

bool is_built();                     // this program has a CUDA backend
int count();                         // GPUs that this process may use; 0 without a driver, never an error
std::string why_none();              // in words, when count() is 0
std::string device_name(int index);  // "NVIDIA H200"
std::string name_of(int index);      // "NVIDIA H200, compute capability 9.0, 139.8 GiB"

std::size_t memory_of(int index);  // bytes of its own
std::string driver_version();      // "CUDA 13.0": the newest that the driver can do; empty without one
// What this program computes with on a GPU, each by name and version; none in a build without CUDA. Needs no GPU.
std::vector<std::pair<std::string, std::string>> libraries();

std::string pci_id(int index);  // which piece of hardware of this host it is

// Makes GPU `index` the calling thread's. Throws Error(kDevice) when there is none of that number, when its
// compute capability is not one that this program was compiled for, or when the driver refuses.
void use(int index);
int current();  // the calling thread's

// A stream of the calling thread's GPU. synchronize() waits for the host's sake and throws what the device found
// wrong meanwhile: a token out of range (kBadInput), a router logit that is not finite (kNumeric), a fault (kDevice).
std::unique_ptr<Stream> make_stream();

// Between memory of the device, behind the stream's work so far.
void copy(Stream& stream, std::byte* to, const std::byte* from, std::size_t bytes);

// Of the calling thread's GPU: what a table of algorithms is for.
ProductLibrary product_library();

// The CUDA stream itself (a cudaStream_t), for libraries that take one.
void* raw(Stream& stream);

// A point in a stream's work.
class Event {
 public:
  explicit Event(bool timed = false);  // on the calling thread's GPU
  ~Event();
  Event(const Event&) = delete;
  void record(Stream& stream);      // the point is now behind what the stream has been given
  void hold(Stream& stream) const;  // the stream's later work waits for the point; the host does not
  void wait() const;                // holds the host until the point has passed; throws Error(kDevice)
  bool has_passed() const;          // true too before the first record(); throws Error(kDevice)
  // By the device's clock; both are timed and have passed.
  double seconds_since(const Event& earlier) const;

 private:
  void* event_ = nullptr;
};

// Behind the stream's work so far: out[i] = slice 0 [i] op slice 1 [i] op ..., in that order and rounded once
// (bf16 in fp32, fp32 in fp64), as the ranks' values are summed on the host. Slice `rank` lies at `own`, the
// other r at `staged` + r * elements. out may be own.
void fold_slices(Stream& stream, ReduceOp op, DType dtype, std::byte* out, const std::byte* staged,
                 const std::byte* own, int rank, int ranks, std::int64_t elements);

// Zero-filled, 256-byte aligned. Throws Error(kFailure) with request, free and total memory, and the largest
// of what this process holds, by name.
std::byte* allocate(std::size_t bytes, std::string_view what);
void release(std::byte* memory) noexcept;
// Pinned memory of the host, zero-filled, that kernels read and write over the bus. Throws Error(kFailure).
std::byte* allocate_on_host(std::size_t bytes, std::string_view what);
void release_on_host(std::byte* memory) noexcept;

// Address space that receives memory as it grows and never moves. bytes is rounded up to the device's granularity.
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
