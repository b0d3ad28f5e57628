// Cross-entropy by clusters against sums in fp64, at the vocabulary of Qwen1.5 and at small ones, in clusters of every
// size. On compute capability 9.0 every step goes through it.

#include <cmath>
#include <random>
#include <type_traits>

#include "kernels/core/bf16.h"
#include "kernels/cuda/sm90/cross_entropy.cuh"
#include "tests/bench/sm90/gpu.cuh"

namespace sm90_bench {

namespace {

using upmoe::bf16;
using upmoe::cuda::sm90::cross_entropy;

constexpr double kTolerance = 1e-2, kLeast = 1e-9;  // a gradient may be wrong by a part of itself and of 1e-7
constexpr float kScale = 0.5f;

__device__ double value(float x) {
  return static_cast<double>(x);
}
__device__ double value(bf16 x) {
  return static_cast<double>(__uint_as_float(static_cast<unsigned>(x.bits) << 16));
}
__global__ void fill_logits(float* x, std::size_t n) {
  for (std::size_t i = blockIdx.x * std::size_t{blockDim.x} + threadIdx.x; i < n;
       i += std::size_t{gridDim.x} * blockDim.x) {
    std::uint64_t z = (i + 1) * 0x9e3779b97f4a7c15ull;
    z = (z ^ z >> 31) * 0xbf58476d1ce4e5b9ull;
    x[i] = static_cast<float>(z >> 40) * 0x1p-20f - 8.0f;
  }
}

// A block for a row, its thread 0 for the sum: slow and plain. worst[0] of losses, worst[1] of gradients.
template <class T>
__global__ void compare(double* worst, const float* logits, const int* targets, const float* loss,
                        const T* gradient, int columns) {
  __shared__ double sums[256];
  const float* x = logits + static_cast<std::size_t>(blockIdx.x) * columns;
  const int target = targets[blockIdx.x];
  const bool ignored = target < 0 || target >= columns;
  double sum = 0;
  for (int c = static_cast<int>(threadIdx.x); c < columns; c += 256) sum += exp(static_cast<double>(x[c]));
  sums[threadIdx.x] = sum;
  __syncthreads();
  sum = 0;
  for (double s : sums) sum += s;
  const auto tell = [&](int what, double got, double want, double small) {
    double w = fabs(got - want) / (fabs(want) + small);
    if (!(w < 1e30)) w = 1e30;  // NaN: not written
    if (w > *static_cast<volatile double*>(worst + what))
      atomicMax(reinterpret_cast<unsigned long long*>(worst + what),
                static_cast<unsigned long long>(__double_as_longlong(w)));
  };
  if (threadIdx.x == 0)
    tell(0, static_cast<double>(loss[blockIdx.x]), ignored ? 0 : log(sum) - static_cast<double>(x[target]),
         0.1);
  for (int c = static_cast<int>(threadIdx.x); c < columns; c += 256) {
    const double want = ignored ? 0
                                : static_cast<double>(kScale) *
                                      (exp(static_cast<double>(x[c])) / sum - (c == target ? 1 : 0));
    tell(1, value(gradient[static_cast<std::size_t>(blockIdx.x) * columns + c]), want, kLeast / kTolerance);
  }
}

template <class T>
bool try_rows(int rows, int columns, int blocks) {
  const std::size_t n = static_cast<std::size_t>(rows) * columns;
  Memory<float> logits(n), loss(rows);
  Memory<T> gradient(n);
  fill_logits<<<1024, 256>>>(logits.data(), n);
  CHECK_GPU(cudaGetLastError());
  std::mt19937 random(4);
  std::vector<int> at(static_cast<std::size_t>(rows));
  for (int& t : at) t = static_cast<int>(random() % static_cast<unsigned>(columns));
  at[0] = columns - 1;
  at[1] = -1;  // ignored, as is the next one
  at[2] = columns;
  const Memory<int> targets(at);
  loss.fill(0xff);
  gradient.fill(0xff);
  cross_entropy<T>({.rows = rows, .columns = columns, .blocks = blocks, .scale = kScale}, loss.data(),
                   gradient.data(), logits.data(), targets.data());
  Memory<double> worst(2);
  worst.fill(0);
  CHECK_GPU(cudaDeviceSynchronize());
  compare<T>
      <<<rows, 256>>>(worst.data(), logits.data(), targets.data(), loss.data(), gradient.data(), columns);
  CHECK_GPU(cudaGetLastError());
  const std::vector<double> got = worst.host();
  const bool right = got[0] <= 1e-5 && got[1] <= kTolerance && got[1] > 0;  // 0: nothing was compared
  const char* type = std::is_same_v<T, float> ? "fp32" : "bf16";
  std::printf(
      "{\"routing\": \"%d columns\", \"kernel\": \"cross-entropy, %s, clusters of %d\", \"right\": %s, "
      "\"errors\": \"%.7f %.5f\"}\n",
      columns, type, blocks, right ? "true" : "false", got[0], got[1]);
  std::printf("%s  cross-entropy, %d columns, %s, clusters of %d: worst loss %.7f, worst gradient %.5f\n",
              right ? "ok  " : "WRONG", columns, type, blocks, got[0], got[1]);
  std::fflush(stdout);
  return right;
}

}  // namespace

int check_cross_entropy() {
  bool right = true;
  for (const int blocks : {1, 2, 4, 8}) {
    right = try_rows<float>(5, 3208, blocks) && right;
    right = try_rows<bf16>(5, 3208, blocks) && right;
  }
  right = try_rows<float>(400, 151936, 8) && right;
  right = try_rows<bf16>(400, 151936, 8) && right;
  right = try_rows<bf16>(4, 462848, 8) && right;  // all the shared memory of eight blocks
  return right ? 0 : 1;
}

}  // namespace sm90_bench
