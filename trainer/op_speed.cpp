#include "trainer/op_speed.h"

#include <algorithm>
#include <chrono>
#include <thread>
#include <vector>

#include "kernels/core/philox.h"
#include "kernels/ops/gemm.h"
#include "kernels/ops/transfer.h"

namespace upmoe {

void fill_random(Exec& ex, TensorView t) {
  constexpr std::int64_t kBlock = 1 << 18;
  const Buffer memory = Buffer::allocate({}, kBlock * sizeof(float));
  const TensorView block = memory.view({std::min(kBlock, t.elements())}, t.dtype);
  std::vector<float> values(static_cast<std::size_t>(block.elements()));
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = uniform_from_bits(philox(1, i)[0]) - 0.5f;
  store_floats(values, block);
  const TensorView flat = t.reshape({t.elements()});
  for (std::int64_t at = 0; at < flat.elements(); at += block.elements()) {
    const std::int64_t end = std::min(at + block.elements(), flat.elements());
    ops::upload(ex, flat.rows(at, end), block.rows(0, end - at));
  }
}

RunTimes times_of(Exec& ex, const Bursts& bursts, const std::function<void()>& work) {
  const auto wait = [&] {
    if (ex.stream != nullptr) ex.stream->synchronize();
  };
  wait();
  const auto once = [&] {
    const auto start = std::chrono::steady_clock::now();
    work();
    wait();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  once();
  double best = once(), sum = best;
  std::int64_t runs = 1;
  for (int burst = 0; burst < bursts.count; ++burst) {
    if (burst > 0) std::this_thread::sleep_for(std::chrono::milliseconds(20));
    for (double spent = 0; spent < bursts.seconds; ++runs) {
      const double t = once();
      best = std::min(best, t);
      sum += t;
      spent += t;
    }
  }
  return {.fastest = best, .usual = sum / static_cast<double>(runs)};
}

double seconds_of_product(Exec& ex, DType dtype, const ProductSize& size, const Bursts& bursts) {
  ScratchScope scope(*ex.scratch);
  TensorView a = ex.scratch->take({size.m, size.k}, dtype, "peak a"),
             b = ex.scratch->take({size.n, size.k}, dtype, "peak b");
  TensorView c = ex.scratch->take({size.m, size.n}, dtype, "peak c");
  fill_random(ex, a);
  fill_random(ex, b);
  const auto work = [&] { ops::gemm(ex, c, {a}, {b, Transpose::kYes}, Accumulate::kOverwrite); };
  return times_of(ex, bursts, work).fastest;
}

}  // namespace upmoe
