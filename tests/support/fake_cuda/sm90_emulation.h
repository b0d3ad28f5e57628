#pragma once
// Hopper's asynchronous instructions on the CPU, under the names of kernels/cuda/sm90/sm90_ptx.cuh: a model that
// computes what the hardware computes, and ends with words where a kernel relies on what it does not promise.
//
// Copies, products and stores to other blocks are operations that happen at a moment between the earliest and the
// latest one allowed (sm90_machine.h). The model knows of barriers (phases, arrivals, bytes), copies by threads and by
// the copy engine, multicast, stores to other blocks of a cluster, which are there behind a barrier of the cluster,
// products that read shared memory late, the state of every 16 bytes of shared memory, and registers that move between
// warpgroups, and what a driver refuses of a tensor map. It does not know: the order of ordinary memory accesses beyond
// barriers, the scopes in the PTX words, the order of sums inside a product, time.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <source_location>
#include <stdexcept>
#include <string>

#include "tests/support/fake_cuda/cuda.h"
#include "tests/support/fake_cuda/cuda_runtime.h"
#include "tests/support/fake_cuda/sm90_traffic.h"

namespace sm90_twin {

struct Mistake : std::runtime_error {  // what run() throws
  explicit Mistake(const std::string& said) : std::runtime_error(said), words(said) {}
  std::string words;
};

enum class When { kEarliest, kLatest, kAnytime };  // operations under way happen

struct Launch {
  unsigned blocks = 1, threads = 128;
  std::size_t shared_bytes = 0;
  unsigned cluster = 1;  // blocks that run together
  When when = When::kAnytime;
  std::uint64_t seed = 1;
  Traffic* traffic = nullptr;  // to be counted here
};
// Runs `body` once for every thread, cluster by cluster.
void run(const Launch& launch, const std::function<void()>& body);

}  // namespace sm90_twin

namespace upmoe::cuda::sm90 {

using u32 = std::uint32_t;
using u64 = std::uint64_t;

using TensorMap = CUtensorMap;

u32 shared_address(const void* p);

// Ordinary loads and stores, which are nothing but counted.
using Site = std::source_location;
template <class T>
T load_from(sm90_twin::Space space, const void* p, const Site& site) {
  if (sm90_twin::counted != nullptr) sm90_twin::count_access({space, "load", site}, p, sizeof(T));
  return *static_cast<const T*>(p);
}
template <class T>
void store_to(sm90_twin::Space space, void* p, const T& value, const Site& site) {
  if (sm90_twin::counted != nullptr) sm90_twin::count_access({space, "store", site}, p, sizeof(T));
  *static_cast<T*>(p) = value;
}
template <class T>
T load_shared(const void* p, const Site& site = Site::current()) {
  return load_from<T>(sm90_twin::Space::kShared, p, site);
}
template <class T>
void store_shared(void* p, const T& value, const Site& site = Site::current()) {
  store_to(sm90_twin::Space::kShared, p, value, site);
}
template <class T>
T load_global(const void* p, const Site& site = Site::current()) {
  return load_from<T>(sm90_twin::Space::kGlobal, p, site);
}
template <class T>
void store_global(void* p, const T& value, const Site& site = Site::current()) {
  store_to(sm90_twin::Space::kGlobal, p, value, site);
}

void mbarrier_init(u64* bar, u32 count);
void fence_mbarrier_init();
void mbarrier_arrive(u64* bar);
void mbarrier_arrive_expect_tx(u64* bar, u32 bytes);
void mbarrier_arrive_remote(u64* bar, u32 rank);
void mbarrier_wait(u64* bar, u32 parity);
void load_box(std::uint16_t blocks, void* to, const TensorMap& map, u64* bar, std::initializer_list<int> at);
void load_box_here(void* to, const TensorMap& map, u64* bar, std::initializer_list<int> at);
template <class... Coordinates>
void tma_load(void* to, const TensorMap& map, u64* bar, Coordinates... at) {
  load_box_here(to, map, bar, {at...});
}
template <class... Coordinates>
void tma_load_multicast(std::uint16_t blocks, void* to, const TensorMap& map, u64* bar, Coordinates... at) {
  load_box(blocks, to, map, bar, {at...});
}

void cp_async_16(void* to, const void* from, bool valid, const Site& site = Site::current());
void cp_async_commit();
void cp_async_arrive(u64* bar);
void wait_copies(std::size_t groups);
template <int kGroups>
void cp_async_wait() {
  wait_copies(kGroups);
}
void fence_proxy_async();

u32 cluster_rank();
void cluster_arrive();
void cluster_wait();
void cluster_sync();
void store_remote(double* to, u32 rank, double value);

void stmatrix_x4(void* row, u32 a, u32 b, u32 c, u32 d, const Site& site = Site::current());
void ldmatrix_x4(const void* row, u32& a, u32& b, u32& c, u32& d, const Site& site = Site::current());
u32 pack_bf16(float low, float high);
inline float exp2_approx(float x) {
  return std::exp2(x);
}
inline float reciprocal_approx(float x) {
  return 1.0f / x;
}

enum class Major { kK = 0, kMN = 1 };
void wgmma_fence();
void wgmma_commit();
void wait_products(std::size_t groups);
template <int kGroups>
void wgmma_wait() {
  wait_products(kGroups);
}
template <int kRegisters>
void wgmma_hold(float (&)[kRegisters]) {}
void multiply(float* d, int n, u64 a, u64 b, bool add, Major major_a, Major major_b);
template <Major kA, Major kB>
void wgmma_m64n256k16(float (&d)[128], u64 a, u64 b, bool add) {
  multiply(d, 256, a, b, add, kA, kB);
}
template <Major kA, Major kB>
void wgmma_m64n128k16(float (&d)[64], u64 a, u64 b, bool add) {
  multiply(d, 128, a, b, add, kA, kB);
}

void move_registers(int to, bool up);
template <int kRegisters>
void setmaxnreg_inc() {
  move_registers(kRegisters, true);
}
template <int kRegisters>
void setmaxnreg_dec() {
  move_registers(kRegisters, false);
}

template <class T>
T& dynamic_shared() {
  return *reinterpret_cast<T*>(simt::dynamic_shared());
}

}  // namespace upmoe::cuda::sm90
