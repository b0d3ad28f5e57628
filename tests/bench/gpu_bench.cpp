#include "tests/bench/gpu_bench.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <random>
#include <set>
#include <sstream>
#include <vector>

#include "kernels/core/gpu.h"
#include "kernels/ops/gemm.h"
#include "kernels/ops/pointwise.h"
#include "kernels/ops/transfer.h"

namespace upmoe::bench {

namespace {

ModelShape& the_shape() {
  static ModelShape s;
  return s;
}
bool is_small() {
  return shape().width < 1000;
}

constexpr std::int64_t kPattern = 1 << 20;

// A million random numbers, repeated: as good as new ones for a product, and quick to make.
template <class T, class Draw>
void fill_random(TensorView device, const Draw& draw) {
  std::minstd_rand random(1);
  std::vector<T> pattern(static_cast<std::size_t>(std::min(kPattern, device.elements())));
  for (T& value : pattern) value = draw(random);
  const TensorView flat = device.reshape({device.elements()});
  for (std::int64_t at = 0; at < flat.elements(); at += kPattern) {
    const std::int64_t n = std::min(kPattern, flat.elements() - at);
    ops::upload(exec(), flat.rows(at, at + n), host_view(static_cast<const T*>(pattern.data()), {n}));
  }
}

double one_go(const std::function<void()>& work) {
  exec().stream->synchronize();
  const auto start = std::chrono::steady_clock::now();
  work();
  exec().stream->synchronize();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Enough repetitions between two waits that the waits do not count.
int repetitions(const std::function<void()>& work) {
  one_go(work);  // the first chooses algorithms and takes memory
  return is_small() ? 1 : std::clamp(static_cast<int>(0.05 / one_go(work)), 1, 200);
}

}  // namespace

const ModelShape& shape() {
  return the_shape();
}
void use_small_shape() {
  the_shape() = {64, 4, 16, 32, 64, 12, 4, 256, 32};
}

Exec& exec() {
  static const std::unique_ptr<Stream> stream = [] {
    gpu::use(0);
    return gpu::make_stream();
  }();
  static Arena scratch({DeviceType::kCuda, 0}, std::size_t{1} << 40, "scratch");
  static Exec ex = [] {
    Exec e;
    e.device = {DeviceType::kCuda, 0};
    e.stream = stream.get();
    e.scratch = &scratch;
    return e;
  }();
  return ex;
}

Tensor::Tensor(Shape s, DType dtype, std::int64_t limit)
    : memory(Buffer::allocate(exec().device, static_cast<std::size_t>(s.elements()) * size_of(dtype),
                              "benchmark")),
      view(memory.view(s, dtype)) {
  std::uniform_real_distribution<float> value(-1, 1);
  if (dtype == DType::kF32) fill_random<float>(view, [&](auto& random) { return value(random); });
  if (dtype == DType::kBF16) fill_random<bf16>(view, [&](auto& random) { return to_bf16(value(random)); });
  if (dtype == DType::kI32)
    fill_random<std::int32_t>(view, [&](auto& random) {
      return static_cast<std::int32_t>(static_cast<std::int64_t>(random()) % limit);
    });
}

double seconds_of(const std::function<void()>& work) {
  const int times = repetitions(work);
  std::array<double, 5> seconds{};
  for (double& s : seconds)
    s = one_go([&] {
          for (int i = 0; i < times; ++i) work();
        }) /
        times;
  std::sort(seconds.begin(), seconds.end());
  return seconds[seconds.size() / 2];
}

double flops_of_cube() {
  const std::int64_t n = is_small() ? 64 : 8192;
  const Tensor a({n, n}, DType::kBF16), b({n, n}, DType::kBF16), c({n, n}, DType::kBF16);
  return 2.0 * static_cast<double>(n * n * n) / seconds_of([&] {
           ops::gemm(exec(), c.view, {a.view}, {b.view, Transpose::kYes}, Accumulate::kOverwrite);
         });
}

double peak_flops() {
  static const double peak = flops_of_cube();
  return peak;
}

double peak_bytes() {
  static const double peak = [] {
    const std::int64_t n = is_small() ? 1 << 14 : std::int64_t{1} << 28;
    const Tensor a({n}, DType::kF32), b({n}, DType::kF32), c({n}, DType::kF32);
    return 12.0 * static_cast<double>(n) / seconds_of([&] { ops::add(exec(), c.view, a.view, b.view); });
  }();
  return peak;
}

void add(const std::string& name, const std::function<Op()>& make) {
  static std::set<std::string> added;  // what is no larger for more tokens is timed once
  if (!added.insert(name).second) return;
  benchmark::RegisterBenchmark(name.c_str(),
                               [make](benchmark::State& state) {
                                 const Op op = make();
                                 Ledger ledger;
                                 Exec booked = exec();
                                 booked.ledger = &ledger;
                                 op(booked);
                                 const Cost cost = ledger.total();
                                 const double bytes = cost.bytes_read + cost.bytes_written;
                                 const double limit =
                                     std::max(bytes / peak_bytes(), cost.flops / peak_flops());
                                 double seconds = 0;
                                 for (auto _ : state) {
                                   seconds = seconds_of([&] { op(exec()); });
                                   state.SetIterationTime(seconds);
                                 }
                                 state.counters["tflops"] = cost.flops / seconds * 1e-12;
                                 state.counters["gbytes"] = bytes / seconds * 1e-9;
                                 state.counters["share"] = limit / seconds;
                                 state.counters["of_gemm"] = cost.flops / seconds / peak_flops();
                               })
      ->UseManualTime()
      ->Iterations(1)
      ->Unit(benchmark::kMicrosecond);
}

Held shuffled(Shape s) {
  std::vector<std::int32_t> order(static_cast<std::size_t>(s.elements()));
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = static_cast<std::int32_t>(i);
  std::shuffle(order.begin(), order.end(), std::minstd_rand(4));
  const Held t = make(s, DType::kI32, 1);
  ops::upload(exec(), t->view.reshape({s.elements()}),
              host_view(static_cast<const std::int32_t*>(order.data()), {s.elements()}));
  return t;
}

}  // namespace upmoe::bench

// usage: bench_gpu [--small] [--tokens=8192,16384,32768] [Google Benchmark's options]
int main(int argc, char** argv) {
  using namespace upmoe;
  benchmark::Initialize(&argc, argv);
  std::string tokens = "8192,16384,32768";
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--small") {
      bench::use_small_shape();
      tokens = "64";
    } else if (argument.starts_with("--tokens=")) {
      tokens = argument.substr(9);
    } else {
      std::fprintf(stderr, "bench_gpu: unknown argument %s\n", argv[i]);
      return 2;
    }
  }
  try {
    bench::exec();
    benchmark::AddCustomContext("gpu", gpu::name_of(0));
    benchmark::AddCustomContext("gemm_tflops", fmt::format("{:.1f}", bench::peak_flops() * 1e-12));
    benchmark::AddCustomContext("gbytes_per_second", fmt::format("{:.0f}", bench::peak_bytes() * 1e-9));
    std::istringstream list(tokens);
    for (std::string one; std::getline(list, one, ',');) {
      bench::add_ops(std::stoll(one));
      bench::add_apart(std::stoll(one));
      bench::add_layer(std::stoll(one));
    }
    // Once more on a card that has become warm: what stands between had one of the two, or something between.
    benchmark::RegisterBenchmark("gemm_8192_cubed/after",
                                 [](benchmark::State& state) {
                                   double flops = 0;
                                   for (auto _ : state) {
                                     flops = bench::flops_of_cube();
                                     state.SetIterationTime(1.0);
                                   }
                                   state.counters["tflops"] = flops * 1e-12;
                                 })
        ->UseManualTime()
        ->Iterations(1);
    benchmark::RunSpecifiedBenchmarks();
  } catch (const std::exception& e) {
    std::fprintf(stderr, "bench_gpu: error: %s\n", e.what());
    return 1;
  }
  benchmark::Shutdown();
}
