#pragma once
// What MFU is a share of.

#include "kernels/core/exec.h"

namespace upmoe {

// The best rate of this rank that this process has seen, FLOP/s: of large matrix products measured at the
// start in several bursts, of every large one later (on a CPU), and of a whole step. So MFU is 1 at most.
class PeakRate {
 public:
  // Measures for about a quarter of a second, in `dtype`, with this rank's threads; all ranks at the same time.
  PeakRate(Exec& ex, DType dtype);
  // One that knows nothing yet.
  explicit PeakRate(DType dtype) : dtype_(dtype) {}

  void saw(double flops, double seconds);  // some work took so long
  // The share of the peak that a step reached, 0 to 1; may raise the peak.
  double share(double flops, double seconds);
  double flops_per_s() const { return best_; }

 private:
  DType dtype_;
  double best_ = 0;
};

}  // namespace upmoe
