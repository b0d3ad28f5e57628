// The experts' kernels against products in fp32 by one thread an element, under awkward routings and at full width.

#include <string>

#include "tests/bench/sm90/experts.cuh"

namespace sm90_bench {

namespace {

constexpr std::size_t kGuard = 1 << 16;  // elements before and behind
constexpr double kTolerance = 1e-2, kWorst = 3e-2;

__device__ float value(bf16 x) {
  return __uint_as_float(static_cast<unsigned>(x.bits) << 16);
}
__device__ int expert_of_row(const int* offsets, int experts, int row) {
  int e = 0;
  while (e + 1 < experts && offsets[e + 1] <= row) ++e;
  return e;
}
// Of a result: squares of errors, squares of what is wanted, and the worst element, which alone would be lost in the
// squares of millions. An element may be wrong by a part of itself and of kSmall.
constexpr int kSums = 3;
constexpr double kSmall = 0.1;
__device__ void add_error(double* sums, float got, float want) {
  double d = static_cast<double>(got) - static_cast<double>(want), n = want;
  if (!(fabs(d) < 1e30)) d = 1e15;  // NaN: not written
  double worst = fabs(d) / (fabs(n) + kSmall);
  d *= d;
  n *= n;
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    d += __shfl_down_sync(0xffffffffu, d, lanes);
    n += __shfl_down_sync(0xffffffffu, n, lanes);
    worst = fmax(worst, __shfl_down_sync(0xffffffffu, worst, lanes));
  }
  if (threadIdx.x % 32 == 0) {
    atomicAdd(sums, d);
    atomicAdd(sums + 1, n);
    // Numbers that are not negative are in the order of their bits.
    if (worst > *static_cast<volatile double*>(sums + 2))
      atomicMax(reinterpret_cast<unsigned long long*>(sums + 2),
                static_cast<unsigned long long>(__double_as_longlong(worst)));
  }
}
struct Dense {  // what a reference reads
  const bf16 *x, *dout, *w1, *w2;
  const float* weight;
  Routing routing;
  int width, neurons, rows;
};
Dense dense_of(const Experts& e) {
  return {e.x.data(),
          e.dout.data(),
          e.gate_up_weights.data(),
          e.down_weights.data(),
          e.weight.data(),
          e.routing(),
          e.width,
          e.neurons,
          e.rows};
}

// Blocks: (columns / 128, rows); each thread an element.
__global__ void check_up(double* sums, Dense p, const bf16* gate_up, const bf16* hidden) {
  const int r = static_cast<int>(blockIdx.y), n = static_cast<int>(blockIdx.x * 128 + threadIdx.x);
  const int e = expert_of_row(p.routing.offsets, p.routing.experts, r);
  const bf16* x = p.x + static_cast<std::int64_t>(p.routing.token_R[r]) * p.width;
  const bf16* w = p.w1 + (static_cast<std::int64_t>(e) * p.neurons + n) * 2 * p.width;
  float gate = 0, up = 0;
  for (int k = 0; k < p.width; ++k) {
    gate += value(x[k]) * value(w[k]);
    up += value(x[k]) * value(w[p.width + k]);
  }
  const std::int64_t at = static_cast<std::int64_t>(r) * p.neurons + n;
  add_error(sums, value(gate_up[2 * at]), gate);
  add_error(sums, value(gate_up[2 * at + 1]), up);
  add_error(sums + kSums, value(hidden[at]), gate / (1 + expf(-gate)) * up * p.weight[r]);
}
// y[r][n] = sum over k of in[r][k] w[e][...].
__global__ void check_rows(double* sums, Dense p, const bf16* y, const bf16* in, const bf16* w, int inner,
                           bool forward) {
  const int r = static_cast<int>(blockIdx.y), n = static_cast<int>(blockIdx.x * 128 + threadIdx.x);
  const int e = expert_of_row(p.routing.offsets, p.routing.experts, r);
  const bf16* of_expert = w + static_cast<std::int64_t>(e) * inner * p.width;
  float sum = 0;
  for (int k = 0; k < inner; ++k)
    sum += value(in[static_cast<std::int64_t>(r) * inner + k]) *
           value(forward ? of_expert[static_cast<std::int64_t>(n) * inner + k]
                         : of_expert[static_cast<std::int64_t>(k) * p.width + n]);
  add_error(sums, value(y[static_cast<std::int64_t>(r) * p.width + n]), sum);
}
__global__ void check_dhidden(double* sums, Dense p, const bf16* gate_up, const bf16* dgate_up,
                              const bf16* hidden, const float* dweight) {
  const int r = static_cast<int>(blockIdx.y), n = static_cast<int>(blockIdx.x * 128 + threadIdx.x);
  const int e = expert_of_row(p.routing.offsets, p.routing.experts, r);
  const bf16* dout = p.dout + static_cast<std::int64_t>(p.routing.token_R[r]) * p.width;
  const bf16* w = p.w2 + static_cast<std::int64_t>(e) * p.width * p.neurons + n;
  float da = 0;
  for (int k = 0; k < p.width; ++k) da += value(dout[k]) * value(w[static_cast<std::int64_t>(k) * p.neurons]);
  const std::int64_t at = static_cast<std::int64_t>(r) * p.neurons + n;
  const float gate = value(gate_up[2 * at]), up = value(gate_up[2 * at + 1]), s = 1 / (1 + expf(-gate));
  const float silu = gate * s, weight = p.weight[r];
  add_error(sums, value(dgate_up[2 * at]), da * weight * up * (s + silu * (1 - s)));
  add_error(sums, value(dgate_up[2 * at + 1]), da * weight * silu);
  add_error(sums + kSums, value(hidden[at]), silu * up * weight);
  __shared__ float parts[4];
  float part = da * silu * up;
  for (int lanes = 16; lanes > 0; lanes /= 2) part += __shfl_down_sync(0xffffffffu, part, lanes);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = part;
  __syncthreads();
  const float want = parts[0] + parts[1] + parts[2] + parts[3];
  add_error(sums + 2 * kSums,
            threadIdx.x == 0 ? dweight[static_cast<std::int64_t>(r) * gridDim.x + blockIdx.x] : 0.0f,
            threadIdx.x == 0 ? want : 0.0f);
}
// Blocks: (X / 128, Y, experts).
__global__ void check_dweights(double* sums, Dense p, const bf16* dw, const bf16* old, const bf16* y,
                               const bf16* x, int columns, bool transposed) {
  const int j = static_cast<int>(blockIdx.x * 128 + threadIdx.x), i = static_cast<int>(blockIdx.y),
            e = static_cast<int>(blockIdx.z);
  const std::int64_t at =
      (static_cast<std::int64_t>(e) * columns * p.width) +
      (transposed ? static_cast<std::int64_t>(j) * columns + i : static_cast<std::int64_t>(i) * p.width + j);
  float sum = old != nullptr ? value(old[at]) : 0.0f;
  for (int r = p.routing.offsets[e]; r < p.routing.offsets[e + 1]; ++r)
    sum += value(y[static_cast<std::int64_t>(r) * columns + i]) *
           value(x[static_cast<std::int64_t>(p.routing.token_R[r]) * p.width + j]);
  add_error(sums, value(dw[at]), sum);
}
__global__ void count_differing(unsigned* count, const unsigned char* a, const unsigned char* b,
                                std::size_t n) {
  unsigned differ = 0;
  for (std::size_t i = blockIdx.x * std::size_t{blockDim.x} + threadIdx.x; i < n;
       i += std::size_t{gridDim.x} * blockDim.x)
    differ += a[i] != b[i];
  if (differ > 0) atomicAdd(count, differ);
}

// Output between guards.
template <class T>
struct Output {
  Memory<T> memory;
  std::size_t n;
  explicit Output(std::size_t size) : memory(size + 2 * kGuard), n(size) { memory.fill(0xff); }
  T* data() { return memory.data() + kGuard; }
  bool guards_stand() const {
    std::vector<unsigned char> bytes(kGuard * sizeof(T));
    for (std::size_t from : {std::size_t{0}, kGuard + n}) {
      CHECK_GPU(cudaMemcpy(bytes.data(), memory.data() + from, bytes.size(), cudaMemcpyDeviceToHost));
      for (unsigned char b : bytes)
        if (b != 0xff) return false;
    }
    return true;
  }
  bool same(const Output& other) const {
    Memory<unsigned> count(1);
    count.fill(0);
    const auto bytes = [](const Output& o) {
      return reinterpret_cast<const unsigned char*>(o.memory.data());
    };
    count_differing<<<1024, 256>>>(count.data(), bytes(*this), bytes(other), memory.size() * sizeof(T));
    CHECK_GPU(cudaGetLastError());
    CHECK_GPU(cudaDeviceSynchronize());
    return count.host()[0] == 0;
  }
};

struct Report {
  const char* routing;
  int failures = 0, lines = 0;
  void line(const char* kernel, const std::vector<double>& sums, bool guards, bool same) {
    std::string errors;
    bool right = guards && same;
    for (std::size_t i = 0; i < sums.size(); i += kSums) {
      // Nothing wanted is nothing compared.
      const double error = sums[i + 1] > 0 ? std::sqrt(sums[i] / sums[i + 1]) : NAN;
      char text[64];
      std::snprintf(text, sizeof text, " %.5f worst %.5f", error, sums[i + 2]);
      errors += text;
      right = right && error <= kTolerance && sums[i + 2] <= kWorst;
    }
    ++lines;
    failures += !right;
    std::printf("{\"routing\": \"%s\", \"kernel\": \"%s\", \"right\": %s, \"errors\": \"%s\"}\n", routing,
                kernel, right ? "true" : "false", errors.c_str() + 1);
    std::printf("%s  %-12s %-22s errors%s  guards %s  twice %s\n", right ? "ok  " : "WRONG", routing, kernel,
                errors.c_str(), guards ? "stand" : "BROKEN", same ? "same" : "DIFFERENT");
    std::fflush(stdout);
  }
};

template <class C>
void try_up(const Experts& e, Report& report, const char* name) {
  const std::size_t n = static_cast<std::size_t>(e.rows) * e.neurons;
  Output<bf16> g1(2 * n), g2(2 * n), h1(n), h2(n);
  experts_up<C>(e, g1.data(), h1.data());
  experts_up<C>(e, g2.data(), h2.data());
  Memory<double> sums(2 * kSums);
  sums.fill(0);
  if (e.rows > 0)
    check_up<<<dim3(e.neurons / 128, e.rows), 128>>>(sums.data(), dense_of(e), g1.data(), h1.data());
  CHECK_GPU(cudaGetLastError());
  CHECK_GPU(cudaDeviceSynchronize());
  report.line(name, sums.host(), g1.guards_stand() && h1.guards_stand(), g1.same(g2) && h1.same(h2));
}
template <class C>
void try_rows(const Experts& e, Report& report, const char* name) {
  constexpr bool kForward = C::kWeights == Major::kK;
  const int inner = kForward ? e.neurons : 2 * e.neurons;
  Memory<bf16> in(static_cast<std::size_t>(e.rows) * inner);
  Experts::random(in, 77, 1.0f);
  Output<bf16> y1(static_cast<std::size_t>(e.rows) * e.width), y2(y1.n);
  experts_rows<C>(e, y1.data(), in.data());
  experts_rows<C>(e, y2.data(), in.data());
  Memory<double> sums(kSums);
  sums.fill(0);
  check_rows<<<dim3(e.width / 128, e.rows), 128>>>(
      sums.data(), dense_of(e), y1.data(), in.data(),
      kForward ? e.down_weights.data() : e.gate_up_weights.data(), inner, kForward);
  CHECK_GPU(cudaGetLastError());
  CHECK_GPU(cudaDeviceSynchronize());
  report.line(name, sums.host(), y1.guards_stand(), y1.same(y2));
}
template <class C>
void try_dhidden(const Experts& e, Report& report, const char* name) {
  const std::size_t n = static_cast<std::size_t>(e.rows) * e.neurons;
  Memory<bf16> gate_up(2 * n);
  Experts::random(gate_up, 78, 2.0f);
  Output<bf16> d1(2 * n), d2(2 * n), h1(n), h2(n);
  Output<float> w1(n / 128), w2(n / 128);
  experts_dhidden<C>(e, d1.data(), h1.data(), w1.data(), gate_up.data());
  experts_dhidden<C>(e, d2.data(), h2.data(), w2.data(), gate_up.data());
  Memory<double> sums(3 * kSums);
  sums.fill(0);
  check_dhidden<<<dim3(e.neurons / 128, e.rows), 128>>>(sums.data(), dense_of(e), gate_up.data(), d1.data(),
                                                        h1.data(), w1.data());
  CHECK_GPU(cudaGetLastError());
  CHECK_GPU(cudaDeviceSynchronize());
  report.line(name, sums.host(), d1.guards_stand() && h1.guards_stand() && w1.guards_stand(),
              d1.same(d2) && h1.same(h2) && w1.same(w2));
}
template <class C>
void try_dweights(const Experts& e, Report& report, const char* name) {
  constexpr bool add = C::kAdd;
  const int columns = C::kTransposed ? e.neurons : 2 * e.neurons;
  Memory<bf16> y(static_cast<std::size_t>(e.rows) * columns);
  Experts::random(y, 79, 1.0f);
  const std::size_t n = static_cast<std::size_t>(e.experts) * columns * e.width;
  Memory<bf16> old(n);
  Experts::random(old, 80, 1.0f);
  Output<bf16> d1(n), d2(n);
  if (add)
    for (Output<bf16>* d : {&d1, &d2})
      CHECK_GPU(cudaMemcpy(d->data(), old.data(), n * sizeof(bf16), cudaMemcpyDeviceToDevice));
  experts_dweights<C>(e, d1.data(), y.data());
  experts_dweights<C>(e, d2.data(), y.data());
  Memory<double> sums(kSums);
  sums.fill(0);
  check_dweights<<<dim3(e.width / 128, columns, e.experts), 128>>>(
      sums.data(), dense_of(e), d1.data(), add ? old.data() : nullptr, y.data(),
      C::kTransposed ? e.dout.data() : e.x.data(), columns, C::kTransposed);
  CHECK_GPU(cudaGetLastError());
  CHECK_GPU(cudaDeviceSynchronize());
  report.line(name, sums.host(), d1.guards_stand(), d1.same(d2));
}

// `which` is all, a kernel, or a kernel's clusters of two or its blocks of their own: up, up_pairs, up_single.
void try_all(const Experts& e, Report& report, const std::string& which) {
  const auto wanted = [&](const std::string& kernel, const char* how) {
    return which == "all" || which == kernel || which == kernel + '_' + how;
  };
  if (wanted("up", "single")) try_up<UpConfig<1, 4>>(e, report, "up, single");
  if (wanted("up", "pairs")) try_up<UpConfig<2, 4>>(e, report, "up, pairs");
  if (wanted("rows", "single")) {
    try_rows<RowsConfig<Major::kK, 1, 4>>(e, report, "down, single");
    try_rows<RowsConfig<Major::kMN, 1, 4>>(e, report, "dx, single");
  }
  if (wanted("rows", "pairs")) {
    try_rows<RowsConfig<Major::kK, 2, 4>>(e, report, "down, pairs");
    try_rows<RowsConfig<Major::kMN, 2, 4>>(e, report, "dx, pairs");
  }
  if (wanted("dhidden", "single")) try_dhidden<DHiddenConfig<1, 5>>(e, report, "dhidden, single");
  if (wanted("dhidden", "pairs")) try_dhidden<DHiddenConfig<2, 5>>(e, report, "dhidden, pairs");
  if (wanted("dweights", "single")) {
    try_dweights<DWeightsConfig<false, false, 1, 4>>(e, report, "dw gate_up, single");
    try_dweights<DWeightsConfig<false, true, 1, 4>>(e, report, "dw gate_up, single, added");
    try_dweights<DWeightsConfig<true, false, 1, 4>>(e, report, "dw down, single");
    try_dweights<DWeightsConfig<true, true, 1, 4>>(e, report, "dw down, single, added");
  }
  if (wanted("dweights", "pairs")) {
    try_dweights<DWeightsConfig<false, false, 2, 4>>(e, report, "dw gate_up, pairs");
    try_dweights<DWeightsConfig<false, true, 2, 4>>(e, report, "dw gate_up, pairs, added");
    try_dweights<DWeightsConfig<true, false, 2, 4>>(e, report, "dw down, pairs");
    try_dweights<DWeightsConfig<true, true, 2, 4>>(e, report, "dw down, pairs, added");
  }
}

}  // namespace

int check_kernels(const char* which) {
  int failures = 0, lines = 0;
  struct Case {
    const char* name;
    std::vector<int> rows;
    int width, neurons;
  };
  std::vector<int> sixty(60);
  std::mt19937_64 random(5);
  for (int i = 0; i < 4096; ++i) ++sixty[random() % 60];
  sixty[7] = 0;
  for (const Case& c :
       {Case{"one row", {0, 0, 1}, 512, 128},
        Case{"tails", {1, 63, 64, 65, 0, 127, 128, 129, 255, 256, 257, 0}, 512, 256},
        Case{"empty ends", {0, 0, 300, 0, 0, 511, 0}, 512, 384},
        Case{"one takes all", {0, 3000, 0}, 1024, 128}, Case{"full width", sixty, 2048, 1408}}) {
    const Experts e(c.rows, c.width, c.neurons, 4, 11);
    Report report{c.name};
    try_all(e, report, which);
    failures += report.failures;
    lines += report.lines;
  }
  if (lines == 0) std::fprintf(stderr, "no kernel '%s'\n", which);
  return failures != 0 || lines == 0;
}

}  // namespace sm90_bench
