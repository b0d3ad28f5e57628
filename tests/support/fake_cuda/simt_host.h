#pragma once
// The language of SIMT kernels on the host: grid, block, shared memory, barriers, warp shuffles and votes.
// The threads of a block are fibers of one operating-system thread, which run from barrier to barrier in an
// order that the tests choose, so that a missing barrier shows. Misuse that hangs or is undefined on a GPU
// ends the program with words: lanes that wait at different places, a shuffle with a lane that has left, a
// barrier not all reach.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

struct uint3 {
  unsigned x = 0, y = 0, z = 0;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};

// Of the fiber that is running; set by the scheduler before it goes on.
inline thread_local uint3 threadIdx, blockIdx;
inline thread_local dim3 blockDim, gridDim;
constexpr int warpSize = 32;

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static thread_local  // the blocks of a thread run one after the other
#define __restrict__ __restrict

namespace simt {

// Why a launch like this fails on a GPU; null when it does not.
const char* problem_of(dim3 grid, dim3 block, std::size_t shared_bytes);
// Runs `body` once for every thread of the grid.
void run(dim3 grid, dim3 block, std::size_t shared_bytes, const std::function<void()>& body);
// In which order the fibers of a block take their turns, from now on: 0 rising, 1 falling, else shuffled anew
// at every barrier. The environment variable UPMOE_SIMT_ORDER sets the beginning.
void set_order(std::uint64_t seed);

// What the threads of a block ask of whoever runs them: run() above, or the clusters of sm90_machine.h.
class Runner {
 public:
  virtual ~Runner() = default;
  virtual void block_barrier() = 0;
  virtual void warp_barrier(unsigned mask) = 0;
  virtual std::byte* dynamic_shared() = 0;
  // This thread's word in; those of all lanes of its warp out, once the lanes of `mask` have given theirs. Good until
  // the thread's next barrier.
  virtual const std::uint64_t* exchange(unsigned mask, std::uint64_t word) = 0;
};
// Of this operating-system thread, from now on; returns the one before.
Runner* set_runner(Runner* runner);

void block_barrier();
void warp_barrier(unsigned mask);
std::byte* dynamic_shared();
const std::uint64_t* exchange(unsigned mask, std::uint64_t word);
inline int lane() {
  return static_cast<int>((threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32);
}

// Everybody's value in, the value of `source` out.
template <class T>
T shuffle(unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= 8);
  std::uint64_t word = 0;
  std::memcpy(&word, &value, sizeof value);
  std::memcpy(&value, exchange(mask, word) + source, sizeof value);
  return value;
}
// Lanes of `mask` whose predicate holds.
unsigned ballot(unsigned mask, bool predicate);
unsigned match(unsigned mask, std::uint64_t word);

}  // namespace simt

inline void __syncthreads() {
  simt::block_barrier();
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  simt::warp_barrier(mask);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return simt::shuffle(mask, value, simt::lane() / width * width + source % width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  const int to = simt::lane() ^ lanes;
  return simt::shuffle(mask, value, to / width == simt::lane() / width ? to : simt::lane());
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes, int width = 32) {
  const int to = simt::lane() - static_cast<int>(lanes);
  return simt::shuffle(mask, value, to >= simt::lane() / width * width ? to : simt::lane());
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int width = 32) {
  const int to = simt::lane() + static_cast<int>(lanes);
  return simt::shuffle(mask, value, to < (simt::lane() / width + 1) * width ? to : simt::lane());
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return simt::ballot(mask, predicate != 0);
}
// Lanes of `mask` that hold the same value as this one.
template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  std::uint64_t word = 0;
  std::memcpy(&word, &value, sizeof value);
  return simt::match(mask, word);
}
inline int __any_sync(unsigned mask, int predicate) {
  return simt::ballot(mask, predicate != 0) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
  return simt::ballot(mask, predicate != 0) == mask;
}
inline int __popc(unsigned x) {
  return std::popcount(x);
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}

// Atomic for the threads of one launch, which is what the kernels need: fibers of one thread.
template <class T>
T atomicAdd(T* at, T x) {
  static_assert(!std::is_floating_point_v<T>, "sums of floating-point atomics depend on the order");
  return __atomic_fetch_add(at, x, __ATOMIC_RELAXED);
}
template <class T>
T atomicMin(T* at, T x) {
  T old = *at;
  if (x < old) *at = x;
  return old;
}
template <class T>
T atomicCAS(T* at, T expected, T x) {
  const T old = *at;
  if (old == expected) *at = x;
  return old;
}
inline void __threadfence() {}

template <class T>
T __ldg(const T* x) {
  return *x;
}
inline float __expf(float x) {
  return std::exp(x);
}
inline float __fdividef(float a, float b) {
  return a / b;
}
inline float __uint_as_float(unsigned x) {
  return std::bit_cast<float>(x);
}
inline float rsqrtf(float x) {
  return 1.0f / std::sqrt(x);
}
using std::isfinite;
using std::isnan;
using std::max;
using std::min;
