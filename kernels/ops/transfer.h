#pragma once
// Between the host's memory and that of an Exec's device. On the CPU both are the same, and these are copies.

#include <functional>

#include "kernels/core/exec.h"

namespace upmoe::ops {

// host = device, once the stream's work so far is done; holds the host until it is there. Throws what that
// work found wrong on the device. Equal shapes and dtypes, here and below; the dry device copies nothing.
void download(Exec& ex, TensorView host, ConstTensorView device);
// device = host, behind the stream's work so far. The host's memory may be written again when the call returns.
void upload(Exec& ex, TensorView device, ConstTensorView host);

// `fill` writes the contents of `device` on the host: in place where that is the same memory. The dry device
// asks for nothing.
void write_through_host(Exec& ex, TensorView device, const std::function<void(TensorView)>& fill);

}  // namespace upmoe::ops
