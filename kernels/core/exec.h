#pragma once
// Where and in which order work happens. An Exec is passed to every op and layer; nothing is ambient.

#include "kernels/core/ledger.h"
#include "kernels/core/memory.h"

namespace upmoe {

// An ordered queue of device work. On the CPU a call has finished when it returns, so the queue is empty.
class Stream {
 public:
  virtual ~Stream() = default;
  virtual void synchronize() {}
  // Moves on what is under way where that takes the host's help. Cheap: called before every op on the CPU.
  virtual void poll() {}
};

struct Exec {
  Device device;
  Stream* compute = nullptr;  // may be null on the CPU
  Stream* comm = nullptr;     // likewise
  Arena* scratch = nullptr;   // temporary memory of ops and layers, through ScratchScope
  Ledger* ledger = nullptr;   // may be null: nothing is booked

  void book(std::string_view op, double flops, double bytes_read, double bytes_written) const {
    if (ledger != nullptr) ledger->book(op, flops, bytes_read, bytes_written);
  }
};

}  // namespace upmoe
