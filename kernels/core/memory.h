#pragma once
// Who owns memory: a Buffer owns one allocation, an Arena hands out pieces of one reserved address range.
// Three lifetimes, three arenas: parameters (whole run), keep (one micro-batch, forward to the end of its
// backward), scratch (one op or one layer call).

#include <cstddef>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/core/tensor.h"

namespace upmoe {

namespace gpu {
class Reservation;
}

class Buffer {  // move-only owner of device or host memory, 64-byte aligned, zero-filled
 public:
  Buffer() = default;
  // `what` names it in a message about memory. Dry device: null data, size remembered. On a GPU:
  // the calling thread's.
  static Buffer allocate(Device device, std::size_t bytes, std::string_view what = "buffer");
  // For a GPU, in pinned memory of the host; elsewhere as allocate(), whose memory is the host's anyway.
  static Buffer allocate_on_host(Device device, std::size_t bytes, std::string_view what);
  std::byte* data() const { return mem_.get(); }
  std::size_t bytes() const { return bytes_; }
  // The buffer's first elements as a tensor; throws when it does not fit.
  TensorView view(Shape shape, DType dtype) const;

 private:
  std::unique_ptr<std::byte, std::function<void(std::byte*)>> mem_;
  std::size_t bytes_ = 0;
  Device device_;
};

// Bump allocator over one reserved address range that is committed on first touch and never moves, so views
// stay valid while data-dependent sizes vary from step to step. Not thread-safe: one arena, one rank.
class Arena {
 public:
  // reserve_bytes is address space, not memory. On the dry device nothing is reserved and null is handed out.
  Arena(Device device, std::size_t reserve_bytes, std::string name);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // Uninitialised, 256-byte aligned. Throws with a table of the largest users when the range is full.
  TensorView take(Shape shape, DType dtype, std::string_view what);
  std::size_t mark() const { return used_; }
  void rewind(std::size_t mark);  // frees everything taken since mark()
  std::size_t used() const { return used_; }
  std::size_t peak() const { return peak_; }  // bytes
  void restart_peak() { peak_ = used_; }      // counts from here on

 private:
  struct Use {
    std::size_t begin, bytes;
    std::string what;
  };
  void commit(std::size_t bytes, std::string_view what);
  std::string largest_users() const;

  Device device_;
  std::string name_;
  std::unique_ptr<gpu::Reservation> on_gpu_;  // null elsewhere
  std::byte* base_ = nullptr;
  std::size_t reserved_ = 0, used_ = 0, peak_ = 0;
  std::vector<Use> uses_;
};

class ScratchScope {  // rewinds on exit; the only way ops and layers take temporary memory
 public:
  explicit ScratchScope(Arena& arena) : arena_(arena), mark_(arena.mark()) {}
  ~ScratchScope() { arena_.rewind(mark_); }
  ScratchScope(const ScratchScope&) = delete;
  ScratchScope& operator=(const ScratchScope&) = delete;

 private:
  Arena& arena_;
  std::size_t mark_;
};

}  // namespace upmoe
