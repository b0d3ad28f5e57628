#pragma once
// How fast the large matrix products of this process ran, on the CPU, where a call has finished when it returns.

#include <chrono>

#include "kernels/core/exec.h"

namespace upmoe::ops {

// FLOP/s of the fastest so far in `dtype`; 0: none yet. Any thread.
double fastest_product(DType dtype);

// Times a product from here to the end of the scope. Small ones, and those of other devices, do not count.
class TimedProduct {
 public:
  TimedProduct(const Exec& ex, DType dtype, double flops);
  ~TimedProduct();
  TimedProduct(const TimedProduct&) = delete;

 private:
  double flops_;  // 0: does not count
  DType dtype_;
  std::chrono::steady_clock::time_point start_;
};

}  // namespace upmoe::ops
