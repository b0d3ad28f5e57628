#include "kernels/ops/product_rate.h"

#include <atomic>

namespace upmoe::ops {

namespace {

constexpr double kLarge = 1e7;  // FLOPs, a tenth of a millisecond and more: the clock is no part of it

std::atomic<double>& fastest(DType dtype) {
  static std::atomic<double> fp32 = 0, bf16 = 0;
  return dtype == DType::kBF16 ? bf16 : fp32;
}

}  // namespace

double fastest_product(DType dtype) {
  return fastest(dtype);
}

TimedProduct::TimedProduct(const Exec& ex, DType dtype, double flops)
    : flops_(ex.device.type == DeviceType::kCpu && flops >= kLarge ? flops : 0), dtype_(dtype) {
  if (flops_ > 0) start_ = std::chrono::steady_clock::now();
}

TimedProduct::~TimedProduct() {
  if (flops_ == 0) return;
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start_;
  const double rate = flops_ / took.count();
  std::atomic<double>& best = fastest(dtype_);
  for (double old = best; old < rate && !best.compare_exchange_weak(old, rate);) {
  }
}

}  // namespace upmoe::ops
