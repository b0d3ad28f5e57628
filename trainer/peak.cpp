#include "trainer/peak.h"

#include <algorithm>

#include "kernels/ops/product_rate.h"
#include "trainer/op_speed.h"

namespace upmoe {

PeakRate::PeakRate(Exec& ex, DType dtype) : dtype_(dtype) {
  const std::int64_t largest = ex.device.type == DeviceType::kCuda ? 8192 : 1024;
  Exec quiet = ex;
  quiet.ledger = nullptr;
  std::int64_t side = 256;  // powers of two: whole blocks of random numbers
  // The largest product that is quick to measure: small ones do not reach the peak, large ones would delay the start.
  while (side < largest && seconds_of_product(quiet, dtype, {side, side, side}, {}) < 0.03) side *= 2;
  const ProductSize cube{side, side, side};
  saw(cube.flops(), seconds_of_product(quiet, dtype, cube, {.count = 4, .seconds = 0.05}));
}

void PeakRate::saw(double flops, double seconds) {
  if (seconds > 0) best_ = std::max(best_, flops / seconds);
}

double PeakRate::share(double flops, double seconds) {
  saw(flops, seconds);
  // A product of the run itself may have been faster than the measured one; a share above 1 would mean nothing.
  best_ = std::max(best_, ops::fastest_product(dtype_));
  return best_ > 0 && seconds > 0 ? flops / seconds / best_ : 0;
}

}  // namespace upmoe
