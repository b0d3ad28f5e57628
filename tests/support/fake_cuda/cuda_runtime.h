#pragma once
// As much of the CUDA runtime as kernels/cuda uses, on the host: the .cu files compile against this folder
// with a C++ compiler and run on the CPU. Memory is host memory, a stream is a thread that takes its work in
// order, and a kernel runs block by block with its threads as fibers (simt_host.h). What the CUDA toolkit's
// own headers say of these names holds here too; what is not here fails to compile.

#include <cstddef>
#include <cstdint>
#include <functional>
#include <type_traits>
#include <utility>

#include "tests/support/fake_cuda/simt_host.h"
#include "tests/support/fake_cuda/stream_order.h"

// The toolkit's own names.
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoDevice = 100,
  cudaErrorNotReady = 600,
  cudaErrorLaunchFailure = 719,
};
enum cudaMemcpyKind { cudaMemcpyDefault = 4 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
};
constexpr unsigned cudaStreamNonBlocking = 1, cudaEventDefault = 0, cudaEventDisableTiming = 2,
                   cudaHostAllocDefault = 0;

using cudaStream_t = struct FakeStream*;
using cudaEvent_t = struct FakeEvent*;

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaRuntimeGetVersion(int* version);
struct cudaDeviceProp {
  char name[256];
  std::size_t totalGlobalMem;
  int major, minor, multiProcessorCount, pciBusID, pciDeviceID, pciDomainID;
};
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device);

cudaError_t cudaMalloc(void** memory, std::size_t bytes);  // filled with NaNs
cudaError_t cudaFree(void* memory);
cudaError_t cudaHostAlloc(void** memory, std::size_t bytes, unsigned flags);
cudaError_t cudaFreeHost(void* memory);
cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total);
cudaError_t cudaMemset(void* memory, int value, std::size_t bytes);
cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t bytes, cudaStream_t stream);
// From pageable memory as the driver does it: the source may be reused when the call returns.
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream);

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamQuery(cudaStream_t stream);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaEventQuery(cudaEvent_t event);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to);

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  void* attrs = nullptr;
  unsigned numAttrs = 0;
};

namespace fake_cuda {
// Gives the stream one piece of work.
void enqueue(cudaStream_t stream, std::function<void()> work);

// Of memory that holds an argument: every pointer in it to the GPUs' memory, as read. What it writes is not told.
void add_pointers_in(const void* argument, std::size_t bytes, Ranges& reads);
// Of a kernel's argument that is a pointer, or a struct or function object with pointers in it: their first bytes.
template <class T>
void add_pointer(const T& argument, Ranges& reads, Ranges& writes) {
  if constexpr (std::is_pointer_v<T>) {
    (std::is_const_v<std::remove_pointer_t<T>> ? reads : writes).push_back({argument, 1});
  } else if constexpr (std::is_class_v<T>) {
    static_assert(std::is_trivially_copyable_v<T>, "a launch copies arguments byte by byte");
    add_pointers_in(&argument, sizeof argument, reads);
  }
}
}  // namespace fake_cuda

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  if (const char* problem = simt::problem_of(config->gridDim, config->blockDim, config->dynamicSmemBytes);
      problem != nullptr)
    return cudaErrorInvalidValue;
  const cudaLaunchConfig_t c = *config;
  if (fake_cuda::is_watched()) {
    fake_cuda::Ranges reads, writes;
    (fake_cuda::add_pointer(static_cast<Parameters>(arguments), reads, writes), ...);
    fake_cuda::touched(c.stream, "a kernel", reads, writes);
  }
  // By value, as a launch takes its arguments.
  fake_cuda::enqueue(c.stream, [c, kernel, ... values = Parameters(std::forward<Arguments>(arguments))] {
    simt::run(c.gridDim, c.blockDim, c.dynamicSmemBytes, [&] { kernel(values...); });
  });
  return cudaSuccess;
}
template <class Function>
cudaError_t cudaFuncSetAttribute(Function*, int, int) {
  return cudaSuccess;
}
constexpr int cudaFuncAttributeMaxDynamicSharedMemorySize = 8;
