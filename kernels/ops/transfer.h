#pragma once
// Between the host's memory and that of an Exec's device. On the CPU both are the same, and these are copies.

#include <functional>
#include <memory>

#include "kernels/core/exec.h"
#include "kernels/core/gpu.h"

namespace upmoe::ops {

// host = device, once the stream's work so far is done; holds the host until it is there. Throws what that
// work found wrong on the device. Equal shapes and dtypes, here and below; the dry device copies nothing.
void download(Exec& ex, TensorView host, ConstTensorView device);
// device = host, behind the stream's work so far. The host's memory may be written again when the call returns.
void upload(Exec& ex, TensorView device, ConstTensorView host);

// Values of the device that set out for the host, which waits for them alone: for their place in the stream's work, not
// for what it was given behind it. (Nor is what that work found wrong thrown here.)
class Landing {
 public:
  // device, as the stream's work so far leaves it; returns at once. What came before is overwritten.
  void start(Exec& ex, ConstTensorView device);
  // Holds the host until they are there: valid until the next start(). On the dry device a view without memory.
  ConstTensorView wait();

 private:
  Buffer memory_;  // pinned, where the device is a GPU
  TensorView values_;
  std::unique_ptr<gpu::Event> there_;  // on a GPU
};

// `fill` writes the contents of `device` on the host: in place where that is the same memory. The dry device
// asks for nothing.
void write_through_host(Exec& ex, TensorView device, const std::function<void(TensorView)>& fill);

}  // namespace upmoe::ops
