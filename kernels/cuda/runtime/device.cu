// Which GPUs there are, and which of them this program was compiled for.

#include <algorithm>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/core/gpu.h"
#include "kernels/cuda/runtime/stream.cuh"

namespace upmoe::gpu {

namespace {

// What this program's kernels were compiled for, as UPMOE_CUDA_TARGETS names it ("80_90a": nvcc would take a
// definition with semicolons for several); PTX is not embedded. Code for 80 runs on 8.0 and every later 8.x; code
// for 90a, with the instructions of that one architecture, on 9.0 alone.
struct Target {
  int major = 0, minor = 0;
  bool alone = false;
  bool runs_on(int gpu_major, int gpu_minor) const {
    return gpu_major == major && (alone ? gpu_minor == minor : gpu_minor >= minor);
  }
};

std::vector<Target> targets() {
  std::vector<Target> all;
  std::string_view left = UPMOE_CUDA_TARGETS;
  while (!left.empty()) {
    const std::string_view one = left.substr(0, left.find('_'));
    left.remove_prefix(std::min(left.size(), one.size() + 1));
    int number = 0;
    for (const char c : one)
      if (c >= '0' && c <= '9') number = number * 10 + (c - '0');
    all.push_back({number / 10, number % 10, one.back() == 'a'});
  }
  return all;
}

std::string target_words() {
  std::string all;
  for (const Target& t : targets())
    all += fmt::format("{}{}.{}{}", all.empty() ? "" : ", ", t.major, t.minor,
                       t.alone ? " alone" : fmt::format(" and later {}.x", t.major));
  return all;
}

}  // namespace

bool is_built() {
  return true;
}

int count() {
  int devices = 0;
  return cudaGetDeviceCount(&devices) == cudaSuccess ? devices : 0;
}

std::string why_none() {
  int devices = 0;
  const cudaError_t status = cudaGetDeviceCount(&devices);
  if (status == cudaSuccess && devices > 0) return {};
  cudaGetLastError();  // the runtime remembers it otherwise
  if (status == cudaErrorInsufficientDriver)
    return "there is no NVIDIA driver, or one too old for CUDA 13 (it needs 580 or newer)";
  return status == cudaSuccess || status == cudaErrorNoDevice
             ? "the NVIDIA driver shows no GPU to this process (see CUDA_VISIBLE_DEVICES)"
             : cudaGetErrorString(status);
}

std::string device_name(int index) {
  cudaDeviceProp properties;
  cuda::check(cudaGetDeviceProperties(&properties, index));
  return properties.name;
}

std::string name_of(int index) {
  cudaDeviceProp properties;
  cuda::check(cudaGetDeviceProperties(&properties, index));
  return fmt::format("{}, compute capability {}.{}, {:.1f} GiB", properties.name, properties.major,
                     properties.minor, static_cast<double>(properties.totalGlobalMem) / (1 << 30));
}

std::size_t memory_of(int index) {
  cudaDeviceProp properties;
  cuda::check(cudaGetDeviceProperties(&properties, index));
  return properties.totalGlobalMem;
}

std::string driver_version() {
  int version = 0;
  if (cudaDriverGetVersion(&version) != cudaSuccess || version == 0) return {};
  return fmt::format("CUDA {}.{}", version / 1000, version / 10 % 100);
}

std::string pci_id(int index) {
  cudaDeviceProp p;
  cuda::check(cudaGetDeviceProperties(&p, index));
  return fmt::format("{:04x}:{:02x}:{:02x}", p.pciDomainID, p.pciBusID, p.pciDeviceID);
}

void use(int index) {
  const int devices = count();
  if (devices == 0) fail(ExitCode::kDevice, "device: cuda was asked for: {}; use device: cpu", why_none());
  if (index < 0 || index >= devices)
    fail(ExitCode::kDevice,
         "this rank wants GPU {} of this host, which shows {} "
         "to it: start as many ranks on a host as it has GPUs",
         index, devices);
  int major = 0, minor = 0;
  cuda::check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
  cuda::check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index));
  bool fits = false;
  for (const Target& t : targets()) fits = fits || t.runs_on(major, minor);
  if (!fits)
    fail(ExitCode::kDevice,
         "GPU {} is {}; this program was compiled for compute capability {}: build it with "
         "UPMOE_CUDA_TARGETS={}{} for "
         "this GPU, or use device: cpu",
         index, name_of(index), target_words(), major, minor);
  cuda::check(cudaSetDevice(index));
}

int current() {
  int index = 0;
  cuda::check(cudaGetDevice(&index));
  return index;
}

}  // namespace upmoe::gpu
