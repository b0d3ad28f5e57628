#pragma once
// How long ops take on this rank's device, for the peak that MFU is a share of and for descriptions of machines.

#include <functional>

#include "kernels/core/exec.h"

namespace upmoe {

// Random numbers, a block of them repeated: products of equal numbers can run faster than real ones.
void fill_random(Exec& ex, TensorView t);

// How long it is tried: bursts of so many seconds, a moment apart, as other work on the machine comes and goes. None:
// twice, the first time of which does not count.
struct Bursts {
  int count = 0;
  double seconds = 0;
};

// Seconds of one run of some work, until the device is done with it.
struct RunTimes {
  double fastest = 0;  // what the device can do
  double usual = 0;    // the mean, of which the time of a step is made
};
RunTimes times_of(Exec& ex, const Bursts& bursts, const std::function<void()>& work);

struct ProductSize {
  std::int64_t m = 0, n = 0, k = 0;
  double flops() const {
    return 2.0 * static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k);
  }
};
// The fastest of c_mn = a_mk b_nk^T in `dtype`. Its tensors come from ex.scratch.
double seconds_of_product(Exec& ex, DType dtype, const ProductSize& size, const Bursts& bursts);

}  // namespace upmoe
