#include "trainer/peak.h"

#include <algorithm>
#include <chrono>
#include <thread>

#include "kernels/core/philox.h"
#include "kernels/ops/gemm.h"
#include "kernels/ops/product_rate.h"
#include "kernels/ops/transfer.h"

namespace upmoe {

namespace {

// Random numbers, a block of them repeated: products of equal numbers can run faster than real ones.
void fill_random(Exec& ex, TensorView t) {
  constexpr std::int64_t kBlock = 1 << 18;
  const Buffer memory = Buffer::allocate({}, kBlock * sizeof(float));
  const TensorView block = memory.view({std::min(kBlock, t.elements())}, t.dtype);
  for (std::int64_t i = 0; i < block.elements(); ++i) {
    const float x = uniform_from_bits(philox(1, static_cast<std::uint64_t>(i))[0]) - 0.5f;
    if (t.dtype == DType::kF32) block.as<float>()[i] = x;
    if (t.dtype == DType::kBF16) block.as<bf16>()[i] = to_bf16(x);
  }
  const TensorView flat = t.reshape({t.elements()});
  for (std::int64_t at = 0; at < flat.elements(); at += block.elements())
    ops::upload(ex, flat.rows(at, at + block.elements()), block);
}

// Seconds of the best of some products of two square matrices: bursts of `budget` seconds, a moment apart, as
// other work on the machine comes and goes.
double best_product(Exec& ex, DType dtype, std::int64_t side, int bursts, double budget) {
  ScratchScope scope(*ex.scratch);
  TensorView a = ex.scratch->take({side, side}, dtype, "peak a"),
             b = ex.scratch->take({side, side}, dtype, "peak b");
  TensorView c = ex.scratch->take({side, side}, dtype, "peak c");
  fill_random(ex, a);
  fill_random(ex, b);
  const auto wait = [&] {
    if (ex.stream != nullptr) ex.stream->synchronize();
  };
  wait();
  const auto once = [&] {
    const auto start = std::chrono::steady_clock::now();
    ops::gemm(ex, c, {a}, {b, Transpose::kYes}, Accumulate::kOverwrite);
    wait();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  once();
  double best = once();
  for (int burst = 0; burst < bursts; ++burst) {
    if (burst > 0) std::this_thread::sleep_for(std::chrono::milliseconds(20));
    for (double spent = 0; spent < budget;) {
      const double t = once();
      best = std::min(best, t);
      spent += t;
    }
  }
  return best;
}

}  // namespace

PeakRate::PeakRate(Exec& ex, DType dtype) : dtype_(dtype) {
  const std::int64_t largest = ex.device.type == DeviceType::kCuda ? 8192 : 1024;
  Exec quiet = ex;
  quiet.ledger = nullptr;
  std::int64_t side = 256;  // powers of two: whole blocks of random numbers
  // The largest product that is quick to measure: small ones do not reach the peak, large ones would delay the start.
  while (side < largest && best_product(quiet, dtype, side, 0, 0) < 0.03) side *= 2;
  saw(2.0 * static_cast<double>(side * side * side), best_product(quiet, dtype, side, 4, 0.05));
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
