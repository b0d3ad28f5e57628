#include "kernels/cuda/runtime/stream.cuh"

#include "kernels/core/gpu.h"

namespace upmoe::cuda {

void check(cudaError_t status, std::source_location where) {
  if (status == cudaSuccess) return;
  fail(ExitCode::kDevice, "CUDA: {} (in {}, {}:{})", cudaGetErrorString(status), where.function_name(),
       where.file_name(), where.line());
}

CudaStream::CudaStream() {
  // Non-blocking: the default stream, which libraries may use, holds no other one up.
  check(cudaStreamCreateWithFlags(&raw_, cudaStreamNonBlocking));
  findings_.emplace(raw_);
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, gpu::current()));
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, gpu::current()));
  sm_ = 10 * major + minor;
  check(cudaDeviceGetAttribute(&multiprocessors_, cudaDevAttrMultiProcessorCount, gpu::current()));
  device_ = gpu::device_name(gpu::current());
}

CudaStream::~CudaStream() {
  // Nothing to do about errors here; the driver frees everything with the process.
  cudaStreamSynchronize(raw_);
  cudaStreamDestroy(raw_);
  cudaFreeHost(staging_);
}

std::byte* CudaStream::staging() {
  void* memory = staging_;
  if (memory == nullptr) check(cudaHostAlloc(&memory, kStaging, cudaHostAllocDefault));
  return staging_ = static_cast<std::byte*>(memory);
}

void CudaStream::synchronize() {
  // What kernels found wrong comes with the work that found it: one copy behind it on the stream, looked at when it is
  // there.
  findings_->fetch();
  check(cudaStreamSynchronize(raw_));
  findings_->report();
}

CudaStream& stream_of(const Exec& ex) {
  UPMOE_CHECK(ex.stream != nullptr, "an op on a GPU has a stream");
  return static_cast<CudaStream&>(*ex.stream);
}

}  // namespace upmoe::cuda

namespace upmoe::gpu {

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

void Event::wait() const {
  cuda::check(cudaEventSynchronize(static_cast<cudaEvent_t>(event_)));
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
  if (bytes == 0) return;  // of no memory, maybe
  cuda::check(
      cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, static_cast<cuda::CudaStream&>(stream).raw()));
}

std::unique_ptr<Stream> make_stream() {
  return std::make_unique<cuda::CudaStream>();
}

}  // namespace upmoe::gpu
