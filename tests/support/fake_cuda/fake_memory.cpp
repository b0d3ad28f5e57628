// Memory of the pretended GPUs: allocations, copies, and the driver's virtual memory.

#include <sys/mman.h>

#include <cstdlib>
#include <vector>

#include "tests/support/fake_cuda/fake_cuda.h"
#include "tests/support/fake_cuda/fake_world.h"

using fake_cuda::planted;
using fake_cuda::World;
using fake_cuda::world;

namespace {

constexpr std::size_t kGranularity = 2 << 20;

bool take(std::size_t bytes) {
  World& w = world();
  const std::lock_guard lock(w.mutex);
  if (bytes > w.memory - w.used) return false;
  w.used += bytes;
  return true;
}

}  // namespace

cudaError_t cudaMalloc(void** memory, std::size_t bytes) {
  if (const cudaError_t e = planted("cudaMalloc"); e != cudaSuccess) return e;
  if (!take(bytes)) return cudaErrorMemoryAllocation;
  *memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256 + 256);
  std::memset(*memory, 0xff, bytes);
  const std::lock_guard lock(world().mutex);
  world().allocations[*memory] = bytes;
  return cudaSuccess;
}
cudaError_t cudaFree(void* memory) {
  if (memory == nullptr) return cudaSuccess;
  cudaDeviceSynchronize();  // as the driver's does
  const std::lock_guard lock(world().mutex);
  const auto it = world().allocations.find(memory);
  if (it == world().allocations.end()) return cudaErrorInvalidValue;
  world().used -= it->second;
  fake_cuda::forgotten({memory, it->second});
  world().allocations.erase(it);
  std::free(memory);
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** memory, std::size_t bytes, unsigned) {
  if (const cudaError_t e = planted("cudaHostAlloc"); e != cudaSuccess) return e;
  *memory = std::malloc(bytes);
  if (*memory == nullptr) return cudaErrorMemoryAllocation;
  const std::lock_guard lock(world().mutex);
  world().pinned[*memory] = bytes;
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void* memory) {
  const std::lock_guard lock(world().mutex);
  world().pinned.erase(memory);
  std::free(memory);
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total) {
  const std::lock_guard lock(world().mutex);
  *free = world().memory - world().used;
  *total = world().memory;
  return cudaSuccess;
}
cudaError_t cudaMemset(void* memory, int value, std::size_t bytes) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t bytes, cudaStream_t stream) {
  fake_cuda::touched(stream, "a fill", {}, {{memory, bytes}});
  fake_cuda::enqueue(stream, [=] { std::memset(memory, value, bytes); });
  return planted("cudaMemsetAsync");
}

namespace {

// Memory that the pretended driver knows; all else is pageable.
bool is_device(const void* p) {
  World& w = world();
  const std::lock_guard lock(w.mutex);
  const auto at = reinterpret_cast<CUdeviceptr>(p);
  auto m = w.mapped.upper_bound(at);
  if (m != w.mapped.begin() && at < std::prev(m)->first + w.handles[std::prev(m)->second]) return true;
  auto a = w.allocations.upper_bound(const_cast<void*>(p));
  return a != w.allocations.begin() &&
         static_cast<const char*>(p) < static_cast<char*>(std::prev(a)->first) + std::prev(a)->second;
}

bool is_pinned(const void* p) {
  World& w = world();
  const std::lock_guard lock(w.mutex);
  const auto at = w.pinned.upper_bound(const_cast<void*>(p));
  return at != w.pinned.begin() &&
         static_cast<const char*>(p) < static_cast<char*>(std::prev(at)->first) + std::prev(at)->second;
}

}  // namespace

void fake_cuda::add_pointers_in(const void* argument, std::size_t bytes, Ranges& reads) {
  const auto* at = static_cast<const std::byte*>(argument);
  for (std::size_t i = 0; i + sizeof(void*) <= bytes; i += alignof(void*)) {
    const void* word = nullptr;
    std::memcpy(&word, at + i, sizeof word);
    if (word != nullptr && is_device(word)) reads.push_back({word, 1});
  }
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind,
                            cudaStream_t stream) {
  if (const cudaError_t e = planted("cudaMemcpyAsync"); e != cudaSuccess) return e;
  // Memory of the host is the host's business: what it waits for before it reads or writes it.
  const bool from_device = is_device(from);
  fake_cuda::touched(stream, "a copy", from_device ? fake_cuda::Ranges{{from, bytes}} : fake_cuda::Ranges{},
                     is_device(to) ? fake_cuda::Ranges{{to, bytes}} : fake_cuda::Ranges{});
  if (from_device) {
    if (!is_device(to) && !is_pinned(to)) ++fake_cuda::waits_of_thread;
    fake_cuda::enqueue(stream, [=] { std::memcpy(to, from, bytes); });
    return cudaSuccess;
  }
  const auto* begin = static_cast<const std::byte*>(from);
  fake_cuda::enqueue(stream, [to, staged = std::vector<std::byte>(begin, begin + bytes)] {
    std::memcpy(to, staged.data(), staged.size());
  });
  return cudaSuccess;
}

// Before main, one after the other.
[[maybe_unused]] static const bool functions_have_names = [] {
  fake_cuda::entry_points().insert(
      {{"cuMemGetAllocationGranularity", reinterpret_cast<void*>(&cuMemGetAllocationGranularity)},
       {"cuMemAddressReserve", reinterpret_cast<void*>(&cuMemAddressReserve)},
       {"cuMemAddressFree", reinterpret_cast<void*>(&cuMemAddressFree)},
       {"cuMemCreate", reinterpret_cast<void*>(&cuMemCreate)},
       {"cuMemRelease", reinterpret_cast<void*>(&cuMemRelease)},
       {"cuMemMap", reinterpret_cast<void*>(&cuMemMap)},
       {"cuMemUnmap", reinterpret_cast<void*>(&cuMemUnmap)},
       {"cuMemSetAccess", reinterpret_cast<void*>(&cuMemSetAccess)}});
  return true;
}();

CUresult cuMemGetAllocationGranularity(std::size_t* granularity, const CUmemAllocationProp*,
                                       CUmemAllocationGranularity_flags) {
  *granularity = kGranularity;
  return CUDA_SUCCESS;
}
CUresult cuMemAddressReserve(CUdeviceptr* address, std::size_t bytes, std::size_t, CUdeviceptr,
                             unsigned long long) {
  void* p = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  *address = reinterpret_cast<CUdeviceptr>(p);
  return p != MAP_FAILED && bytes % kGranularity == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuMemAddressFree(CUdeviceptr address, std::size_t bytes) {
  return munmap(reinterpret_cast<void*>(address), bytes) == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuMemCreate(CUmemGenericAllocationHandle* handle, std::size_t bytes, const CUmemAllocationProp*,
                     unsigned long long) {
  if (bytes % kGranularity != 0) return CUDA_ERROR_INVALID_VALUE;
  if (!take(bytes)) return CUDA_ERROR_OUT_OF_MEMORY;
  const std::lock_guard lock(world().mutex);
  *handle = world().next_handle++;
  world().handles[*handle] = bytes;
  return CUDA_SUCCESS;
}
// As the driver does it, the memory lives as long as it is mapped.
CUresult cuMemRelease(CUmemGenericAllocationHandle) {
  return CUDA_SUCCESS;
}
CUresult cuMemMap(CUdeviceptr address, std::size_t bytes, std::size_t offset,
                  CUmemGenericAllocationHandle handle, unsigned long long) {
  const std::lock_guard lock(world().mutex);
  if (offset != 0 || world().handles.count(handle) == 0 || world().handles[handle] != bytes)
    return CUDA_ERROR_INVALID_VALUE;
  world().mapped[address] = handle;
  return CUDA_SUCCESS;
}
CUresult cuMemUnmap(CUdeviceptr address, std::size_t bytes) {
  const std::lock_guard lock(world().mutex);
  std::size_t unmapped = 0;
  for (auto it = world().mapped.lower_bound(address);
       it != world().mapped.end() && it->first < address + bytes;) {
    unmapped += world().handles[it->second];
    world().handles.erase(it->second);
    it = world().mapped.erase(it);
  }
  world().used -= unmapped;
  fake_cuda::forgotten({reinterpret_cast<void*>(address), bytes});
  if (unmapped != bytes) return CUDA_ERROR_INVALID_VALUE;
  madvise(reinterpret_cast<void*>(address), bytes, MADV_DONTNEED);
  mprotect(reinterpret_cast<void*>(address), bytes, PROT_NONE);
  return CUDA_SUCCESS;
}
CUresult cuMemSetAccess(CUdeviceptr address, std::size_t bytes, const CUmemAccessDesc*, std::size_t) {
  void* p = reinterpret_cast<void*>(address);
  if (mprotect(p, bytes, PROT_READ | PROT_WRITE) != 0) return CUDA_ERROR_INVALID_VALUE;
  // Gigabytes stay untouched: no test computes in them.
  if (bytes <= std::size_t{256} << 20) std::memset(p, 0xff, bytes);
  return CUDA_SUCCESS;
}
