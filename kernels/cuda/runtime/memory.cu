// Device memory: single allocations, and address ranges that grow.

#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <vector>

#include "kernels/core/gpu.h"
#include "kernels/cuda/runtime/stream.cuh"

namespace upmoe::gpu {

namespace {

// Who holds how much on which device, for the words of an out-of-memory error.
struct Holding {
  int device;
  std::size_t bytes;
  std::string what;
};
struct Book {
  std::mutex mutex;
  std::map<const void*, Holding> holdings;
};
Book& book() {
  static Book* b = new Book;  // never destroyed: memory of static storage is given back after everything else
  return *b;
}

void hold(const void* key, std::size_t bytes, std::string_view what) {
  const int device = current();
  const std::lock_guard lock(book().mutex);
  book().holdings[key] = {device, bytes, std::string(what)};
}

void drop(const void* key) {
  const std::lock_guard lock(book().mutex);
  book().holdings.erase(key);
}

[[noreturn]] void fail_out_of_memory(std::size_t bytes, std::string_view what) {
  const int device = current();
  std::map<std::string, std::size_t> by_name;
  {
    const std::lock_guard lock(book().mutex);
    for (const auto& [key, h] : book().holdings)
      if (h.device == device) by_name[h.what] += h.bytes;
  }
  std::vector<std::pair<std::size_t, std::string>> largest;
  for (const auto& [name, size] : by_name) largest.emplace_back(size, name);
  std::sort(largest.rbegin(), largest.rend());
  std::string table;
  for (std::size_t i = 0; i < std::min<std::size_t>(8, largest.size()); ++i)
    table += fmt::format("\n  {:>16} bytes  {}", largest[i].first, largest[i].second);
  std::size_t free = 0, total = 0;
  cudaMemGetInfo(&free, &total);
  fail(ExitCode::kFailure,
       "out of memory on GPU {}: '{}' asks for {} bytes, {} of {} are free; this process holds:{}\n"
       "lower train.micro_batch, set train.recompute, or use more ranks",
       device, what, bytes, free, total, table);
}

// The driver's functions, found at run time: the program must start where there is no driver.
template <class F>
F* driver_function(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
  cuda::check(cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found));
  if (function == nullptr) fail(ExitCode::kDevice, "the NVIDIA driver has no {}: it is too old", name);
  return reinterpret_cast<F*>(function);
}

struct Driver {
  decltype(cuMemGetAllocationGranularity)* granularity =
      driver_function<decltype(cuMemGetAllocationGranularity)>("cuMemGetAllocationGranularity");
  decltype(cuMemAddressReserve)* reserve =
      driver_function<decltype(cuMemAddressReserve)>("cuMemAddressReserve");
  decltype(cuMemAddressFree)* unreserve = driver_function<decltype(cuMemAddressFree)>("cuMemAddressFree");
  decltype(cuMemCreate)* create = driver_function<decltype(cuMemCreate)>("cuMemCreate");
  decltype(cuMemRelease)* release = driver_function<decltype(cuMemRelease)>("cuMemRelease");
  decltype(cuMemMap)* map = driver_function<decltype(cuMemMap)>("cuMemMap");
  decltype(cuMemUnmap)* unmap = driver_function<decltype(cuMemUnmap)>("cuMemUnmap");
  decltype(cuMemSetAccess)* set_access = driver_function<decltype(cuMemSetAccess)>("cuMemSetAccess");
};
const Driver& driver() {
  static const Driver d;
  return d;
}

void check_driver(CUresult status, const char* what) {
  if (status != CUDA_SUCCESS)
    fail(ExitCode::kDevice, "CUDA driver: {} failed with status {}", what, static_cast<int>(status));
}

CUmemAllocationProp properties_of(int device) {
  CUmemAllocationProp p{};
  p.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  p.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  p.location.id = device;
  return p;
}

std::size_t granularity() {
  const CUmemAllocationProp p = properties_of(current());
  std::size_t bytes = 0;
  check_driver(driver().granularity(&bytes, &p, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED),
               "cuMemGetAllocationGranularity");
  return bytes;
}

std::size_t round_up(std::size_t n, std::size_t unit) {
  return (n + unit - 1) / unit * unit;
}

CUdeviceptr address_of(const std::byte* p) {
  return reinterpret_cast<CUdeviceptr>(p);
}

}  // namespace

std::byte* allocate(std::size_t bytes, std::string_view what) {
  void* memory = nullptr;
  const cudaError_t status = cudaMalloc(&memory, bytes);
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    fail_out_of_memory(bytes, what);
  }
  cuda::check(status);
  hold(memory, bytes, what);
  cuda::check(cudaMemset(memory, 0, bytes));
  cuda::check(cudaStreamSynchronize(nullptr));  // streams do not wait for the fill by themselves
  return static_cast<std::byte*>(memory);
}

void release(std::byte* memory) noexcept {
  drop(memory);
  cudaFree(memory);  // an error here is an earlier one's, reported where it came up
}

std::byte* allocate_on_host(std::size_t bytes, std::string_view what) {
  void* memory = nullptr;
  const cudaError_t status = cudaHostAlloc(&memory, bytes, cudaHostAllocDefault);
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    fail(ExitCode::kFailure,
         "out of memory of the host: '{}' asks for {} bytes that stay in place (pinned); keep it on the GPU "
         "(optimizer.offload: false), use more ranks, or raise the limit on locked memory",
         what, bytes);
  }
  cuda::check(status);
  std::memset(memory, 0, bytes);
  return static_cast<std::byte*>(memory);
}

void release_on_host(std::byte* memory) noexcept {
  cudaDeviceSynchronize();  // nothing may still be at work in it
  cudaFreeHost(memory);
}

// Addresses cost nothing, so a range is reserved far larger than needed, and memory is mapped into it from the front as
// it is used. What grows never moves, so views into it stay good:
//
//   base_   | piece 0 | piece 1 |  piece 2  | addresses without memory ...      |
//                                           ^ committed_                        ^ reserved_
Reservation::Reservation(std::size_t bytes, std::string_view what) : what_(what) {
  reserved_ = round_up(std::max<std::size_t>(bytes, 1), granularity());
  CUdeviceptr address = 0;
  check_driver(driver().reserve(&address, reserved_, 0, 0, 0), "cuMemAddressReserve");
  base_ = reinterpret_cast<std::byte*>(address);
  hold(base_, 0, what_);
}

Reservation::~Reservation() {
  drop(base_);
  cudaDeviceSynchronize();  // nothing may still be at work in it
  std::size_t at = 0;
  for (std::size_t piece : pieces_) {
    driver().unmap(address_of(base_) + at, piece);  // as it was mapped
    at += piece;
  }
  driver().unreserve(address_of(base_), reserved_);
}

void Reservation::commit(std::size_t bytes) {
  if (bytes <= committed_) return;
  UPMOE_CHECK(bytes <= reserved_, "'{}': {} of {} reserved bytes", what_, bytes, reserved_);
  // By an eighth of what there is, so that growing step by step costs few calls; but by no more than what a hundred
  // calls a step would not show, because near the limit every arena, library and communicator wants what is left.
  constexpr std::size_t kMostAhead = std::size_t{512} << 20;
  const std::size_t unit = granularity();
  const std::size_t wanted = round_up(bytes - committed_, unit);
  const std::size_t ahead = std::min(committed_ / 8, kMostAhead);
  const std::size_t generous = std::min(round_up(std::max(wanted, ahead), unit), reserved_ - committed_);
  const int device = current();
  const CUmemAllocationProp p = properties_of(device);
  CUmemGenericAllocationHandle handle{};
  std::size_t grown = generous;
  CUresult status = driver().create(&handle, grown, &p, 0);
  // What was asked for may still fit where more does not.
  if (status == CUDA_ERROR_OUT_OF_MEMORY && generous > wanted) {
    grown = wanted;
    status = driver().create(&handle, grown, &p, 0);
  }
  if (status == CUDA_ERROR_OUT_OF_MEMORY) fail_out_of_memory(wanted, what_);
  check_driver(status, "cuMemCreate");
  const CUdeviceptr at = address_of(base_) + committed_;
  check_driver(driver().map(at, grown, 0, handle, 0), "cuMemMap");
  check_driver(driver().release(handle), "cuMemRelease");  // the mapping keeps it
  CUmemAccessDesc access{};
  access.location = p.location;
  access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  check_driver(driver().set_access(at, grown, &access, 1), "cuMemSetAccess");
  committed_ += grown;
  pieces_.push_back(grown);
  hold(base_, committed_, what_);
}

}  // namespace upmoe::gpu
