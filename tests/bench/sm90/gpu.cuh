#pragma once
// What the programs of this folder share: device memory, launches, errors that end the program.

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <set>
#include <utility>
#include <vector>

#define CHECK_GPU(call) ::sm90_bench::check_gpu(call, #call, __FILE__, __LINE__)

namespace sm90_bench {

inline void check_gpu(cudaError_t error, const char* what, const char* file, int line) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s:%d: %s: %s\n", file, line, what, cudaGetErrorString(error));
  std::fflush(nullptr);
  std::_Exit(3);
}

// Elements on the device.
template <class T>
class Memory {
 public:
  explicit Memory(std::size_t n) : size_(n) {
    CHECK_GPU(cudaMalloc(reinterpret_cast<void**>(&data_), n * sizeof(T) + 256));
  }
  explicit Memory(const std::vector<T>& from) : Memory(from.size()) {
    CHECK_GPU(cudaMemcpy(data_, from.data(), size_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  ~Memory() { cudaFree(data_); }
  Memory(const Memory&) = delete;
  T* data() const { return data_; }
  std::size_t size() const { return size_; }
  std::vector<T> host() const {
    std::vector<T> to(size_);
    CHECK_GPU(cudaMemcpy(to.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost));
    return to;
  }
  void fill(int byte) { CHECK_GPU(cudaMemset(data_, byte, size_ * sizeof(T))); }

 private:
  T* data_ = nullptr;
  std::size_t size_;
};

// Once for each kernel: whether all clusters of its first launch find a place at once. The kernels' tiles are dealt out
// before they begin, so that a cluster that waits for another one's end doubles the time.
template <class... Parameters>
void check_clusters(void (*kernel)(Parameters...), const cudaLaunchConfig_t& config, int clusters) {
  static std::set<const void*> seen;
  if (!seen.insert(reinterpret_cast<const void*>(kernel)).second) return;
  int at_once = 0;
  CHECK_GPU(cudaOccupancyMaxActiveClusters(&at_once, kernel, &config));
  if (at_once < clusters)
    std::printf("NOTE  of %d clusters of %u blocks with %zu bytes of shared memory %d find a place at once\n",
                clusters, config.attrs[0].val.clusterDim.x, config.dynamicSmemBytes, at_once);
}

// In clusters of `cluster` blocks.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int blocks, int threads, std::size_t shared_bytes, int cluster,
            const Arguments&... arguments) {
  CHECK_GPU(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes)));
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(blocks);
  config.blockDim = static_cast<unsigned>(threads);
  config.dynamicSmemBytes = shared_bytes;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  check_clusters(kernel, config, blocks / cluster);
  CHECK_GPU(cudaLaunchKernelEx(&config, kernel, arguments...));
}

inline int multiprocessors() {
  static const int count = [] {
    int n = 0;
    CHECK_GPU(cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, 0));
    return n;
  }();
  return count;
}

int check_instructions();
int check_cross_entropy();
int check_kernels(const char* which);
int time_kernels(int tokens, const char* routing, const char* which);

}  // namespace sm90_bench
