#pragma once
// What the benchmarks of ops on a CPU share: sizes, tensors, times as a share of the machine's peak of the same run.

#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>
#include <map>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "kernels/core/exec.h"
#include "kernels/ops/gemm.h"
#include "kernels/ops/pointwise.h"

namespace upmoe::bench {

constexpr std::int64_t kTokens = 2048, kTopK = 4, kExperts = 60;

struct Model {
  const char* name;
  std::int64_t width, expert_width, vocab;
};
constexpr Model kModels[] = {{"tiny", 256, 176, 4096}, {"mid", 1024, 704, 8192}};
constexpr DType kFloats[] = {DType::kF32, DType::kBF16};

inline Exec& exec() {
  static Arena scratch({}, std::size_t{4} << 30, "scratch");
  static Exec ex = [] {
    Exec e;
    e.scratch = &scratch;
    return e;
  }();
  return ex;
}

// A tensor with its own memory, filled with numbers between -1 and 1.
struct Tensor {
  Buffer memory;
  TensorView view;

  Tensor(Shape shape, DType dtype)
      : memory(Buffer::allocate({}, static_cast<std::size_t>(shape.elements()) * size_of(dtype))),
        view(memory.view(shape, dtype)) {
    std::minstd_rand random(1);
    std::uniform_real_distribution<float> value(-1, 1);
    for (std::int64_t i = 0; i < shape.elements(); ++i) {
      if (dtype == DType::kF32) view.as<float>()[i] = value(random);
      if (dtype == DType::kBF16) view.as<bf16>()[i] = to_bf16(value(random));
    }
  }
};

inline double seconds_of(const std::function<void()>& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

inline double best_seconds(const std::function<void()>& work, double budget = 0.5) {
  work();
  double best = seconds_of(work);
  for (double spent = best; spent < budget;) {
    const double t = seconds_of(work);
    best = std::min(best, t);
    spent += t;
  }
  return best;
}

// FLOP/s of the best square product of 1024 and 2048.
inline double peak_flops(DType dtype) {
  static std::map<DType, double> known;
  if (const auto found = known.find(dtype); found != known.end()) return found->second;
  double best = 0;
  for (std::int64_t side : {1024, 2048}) {
    const Tensor a({side, side}, dtype), b({side, side}, dtype), c({side, side}, dtype);
    const double seconds = best_seconds([&] {
      ops::gemm(exec(), c.view, {a.view}, {b.view, Transpose::kYes}, Accumulate::kOverwrite);
    });
    best = std::max(best, 2.0 * static_cast<double>(side * side * side) / seconds);
  }
  return known[dtype] = best;
}

// Bytes per second of a sum of two arrays into a third, far beyond the caches.
inline double peak_bytes() {
  static const double peak = [] {
    constexpr std::int64_t kElements = std::int64_t{1} << 25;
    const Tensor a({kElements}, DType::kF32), b({kElements}, DType::kF32), c({kElements}, DType::kF32);
    return 12.0 * kElements / best_seconds([&] { ops::add(exec(), c.view, a.view, b.view); }, 1.0);
  }();
  return peak;
}

// Times `op`, whose cost is what it books itself. share_of_peak is of the slower of both limits.
inline void measure(benchmark::State& state, DType dtype, const std::function<void(Exec&)>& op) {
  Ledger ledger;
  Exec booked = exec();
  booked.ledger = &ledger;
  op(booked);
  UPMOE_CHECK(!ledger.entries().empty(), "what is measured books nothing");
  const Cost cost = ledger.total();
  const double bytes = cost.bytes_read + cost.bytes_written;
  const bool products = ledger.entries().begin()->first.find("gemm") != std::string::npos;
  const double limit_seconds =
      std::max(bytes / peak_bytes(), products ? cost.flops / peak_flops(dtype) : 0.0);
  double best = 1e9;
  for (auto _ : state) {
    const double t = seconds_of([&] { op(exec()); });
    state.SetIterationTime(t);
    best = std::min(best, t);
  }
  state.counters["gflops"] = cost.flops / best * 1e-9;
  state.counters["gbytes"] = bytes / best * 1e-9;
  state.counters["share_of_peak"] = limit_seconds / best;
}

inline void add(const std::string& name, DType dtype, const std::function<void(benchmark::State&)>& body) {
  benchmark::RegisterBenchmark((name + "/" + name_of(dtype)).c_str(), body)
      ->UseManualTime()
      ->Unit(benchmark::kMicrosecond);
}

void add_decode();
void add_dense();
void add_routers();
void add_routed();
void add_group_routers();

}  // namespace upmoe::bench
