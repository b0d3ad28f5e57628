// Which GPUs there are, and which of them this program was compiled for.

#include <string>
#include <string_view>
#include <vector>

#include "kernels/core/gpu.h"
#include "kernels/cuda/runtime/stream.cuh"

namespace upmoe::gpu {

namespace {

// The major compute capabilities that this program's kernels were compiled for ("8_9_10": nvcc would take a
// definition with commas for several); PTX is not embedded.
std::vector<int> compiled_majors() {
  std::vector<int> majors{0};
  for (const char c : std::string_view(UPMOE_CUDA_MAJORS)) {
    if (c == '_') {
      majors.push_back(0);
    } else {
      majors.back() = majors.back() * 10 + (c - '0');
    }
  }
  return majors;
}

std::string capability_words() {
  std::string all;
  for (int major : compiled_majors()) all += fmt::format("{}{}.x", all.empty() ? "" : ", ", major);
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

std::string name_of(int index) {
  cudaDeviceProp properties;
  cuda::check(cudaGetDeviceProperties(&properties, index));
  return fmt::format("{}, compute capability {}.{}, {:.1f} GiB", properties.name, properties.major,
                     properties.minor, static_cast<double>(properties.totalGlobalMem) / (1 << 30));
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
         "this rank wants GPU {} of this host, which shows {} to it: start as many ranks on a host as it has "
         "GPUs",
         index, devices);
  int major = 0;
  cuda::check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
  bool fits = false;
  for (int m : compiled_majors()) fits = fits || m == major;
  if (!fits)
    fail(ExitCode::kDevice,
         "GPU {} is {}; this program was compiled for compute capability {}: build it with "
         "UPMOE_CUDA_TARGETS for "
         "this GPU, or use device: cpu",
         index, name_of(index), capability_words());
  cuda::check(cudaSetDevice(index));
}

int current() {
  int index = 0;
  cuda::check(cudaGetDevice(&index));
  return index;
}

}  // namespace upmoe::gpu
