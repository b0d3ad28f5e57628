#include "kernels/cuda/runtime/stream.cuh"

#include <cstring>

#include "kernels/core/gpu.h"

namespace upmoe::cuda {

void check(cudaError_t status, std::source_location where) {
  if (status == cudaSuccess) return;
  fail(ExitCode::kDevice, "CUDA: {} (in {}, {}:{})", cudaGetErrorString(status), where.function_name(),
       where.file_name(), where.line());
}

CudaStream::CudaStream() {
  check(cudaStreamCreateWithFlags(&raw_, cudaStreamNonBlocking));
  void* memory = nullptr;
  check(cudaMalloc(&memory, kFindings * sizeof *findings_));
  findings_ = static_cast<FindingWords>(memory);
  check(cudaHostAlloc(&memory, kFindings * sizeof *seen_, cudaHostAllocDefault));
  seen_ = static_cast<FindingWords>(memory);
  check(cudaMemsetAsync(findings_, 0xff, kFindings * sizeof *findings_, raw_));
}

CudaStream::~CudaStream() {
  // Nothing to do about errors here; the driver frees everything with the process.
  cudaStreamSynchronize(raw_);
  cudaStreamDestroy(raw_);
  cudaFree(findings_);
  cudaFreeHost(seen_);
}

void CudaStream::synchronize() {
  check(cudaMemcpyAsync(seen_, findings_, kFindings * sizeof *seen_, cudaMemcpyDefault, raw_));
  check(cudaStreamSynchronize(raw_));
  report();
}

void CudaStream::report() {
  for (int kind = 0; kind < kFindings; ++kind) {
    if (seen_[kind] == ~0ull) continue;
    const auto row = static_cast<std::int64_t>(seen_[kind] >> 32);
    const auto value = static_cast<std::uint32_t>(seen_[kind]);
    const std::int64_t limit = limits_[kind];
    check(cudaMemsetAsync(findings_, 0xff, kFindings * sizeof *findings_, raw_));  // told once
    switch (static_cast<Finding>(kind)) {
      case Finding::kToken:
        fail(ExitCode::kBadInput,
             "token {} at position {} of the batch is outside the vocabulary [0, {}): the data was made with "
             "another tokenizer; tokenise it with the model's own",
             static_cast<std::int32_t>(value), row, limit);
      case Finding::kTarget:
        fail(ExitCode::kBadInput,
             "target {} at position {} of the chunk is outside the vocabulary [0, {}) and is not -1 "
             "(ignored): the data was made with another tokenizer; tokenise it with the model's own",
             static_cast<std::int32_t>(value), row, limit);
      case Finding::kLogit:
        fail(ExitCode::kNumeric,
             "router logit of token row {} and expert {} is not finite: the training has diverged; lower the "
             "learning rate or restart from an earlier checkpoint",
             row, value);
      case Finding::kIndex:
        fail(ExitCode::kFailure, "an index of row {} is {}, expected less than {}; this is a bug", row,
             static_cast<std::int32_t>(value), limit);
    }
  }
}

CudaStream& stream_of(const Exec& ex) {
  UPMOE_CHECK(ex.stream != nullptr, "an op on a GPU has a stream");
  return static_cast<CudaStream&>(*ex.stream);
}

}  // namespace upmoe::cuda

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

void* raw(Stream& stream) {
  return static_cast<cuda::CudaStream&>(stream).raw();
}

Event::Event(bool timed) {
  cudaEvent_t event = nullptr;
  cuda::check(cudaEventCreateWithFlags(&event, timed ? cudaEventDefault : cudaEventDisableTiming));
  event_ = event;
}

Event::~Event() {
  cudaEventDestroy(static_cast<cudaEvent_t>(event_));
}

void Event::record(Stream& stream) {
  cuda::check(
      cudaEventRecord(static_cast<cudaEvent_t>(event_), static_cast<cuda::CudaStream&>(stream).raw()));
}

void Event::hold(Stream& stream) const {
  cuda::check(
      cudaStreamWaitEvent(static_cast<cuda::CudaStream&>(stream).raw(), static_cast<cudaEvent_t>(event_), 0));
}

bool Event::has_passed() const {
  const cudaError_t status = cudaEventQuery(static_cast<cudaEvent_t>(event_));
  if (status == cudaErrorNotReady) return false;
  cuda::check(status);
  return true;
}

double Event::seconds_since(const Event& earlier) const {
  float milliseconds = 0;
  cuda::check(cudaEventElapsedTime(&milliseconds, static_cast<cudaEvent_t>(earlier.event_),
                                   static_cast<cudaEvent_t>(event_)));
  return static_cast<double>(milliseconds) * 1e-3;
}

void copy(Stream& stream, std::byte* to, const std::byte* from, std::size_t bytes) {
  cuda::check(
      cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, static_cast<cuda::CudaStream&>(stream).raw()));
}

std::unique_ptr<Stream> make_stream() {
  return std::make_unique<cuda::CudaStream>();
}

}  // namespace upmoe::gpu
