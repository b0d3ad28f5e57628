#include "kernels/ops/transfer.h"

#include "kernels/ops/check_tensor.h"
#include "kernels/ops/dispatch.h"

namespace upmoe::ops {

namespace {

void check_host(const ConstTensorView& host) {
  UPMOE_CHECK(host.device.type == DeviceType::kCpu && (host.data != nullptr || host.elements() == 0),
              "a host tensor lies on the host");
}

}  // namespace

void download(Exec& ex, TensorView host, ConstTensorView device) {
  check_host(host);
  check_tensor(ex, device, host.shape, host.dtype, "device");
  ex.book("download", 0, bytes_of(device), bytes_of(host));
  dispatch(ex, &Backend::download, host, device);
}

void upload(Exec& ex, TensorView device, ConstTensorView host) {
  check_host(host);
  check_tensor(ex, device, host.shape, host.dtype, "device");
  ex.book("upload", 0, bytes_of(host), bytes_of(device));
  dispatch(ex, &Backend::upload, device, host);
}

void Landing::start(Exec& ex, ConstTensorView device) {
  check_tensor(ex, device, device.shape, device.dtype, "device");
  ex.book("download", 0, bytes_of(device), bytes_of(device));
  if (memory_.bytes() < device.bytes())
    memory_ = Buffer::allocate_on_host(ex.device, device.bytes(), "values on their way to the host");
  values_ = {memory_.data(), device.shape, device.dtype, Device{}};
  if (ex.device.type == DeviceType::kDry) return;
  if (ex.watcher != nullptr) ex.watcher->reads(device);
  if (ex.device.type == DeviceType::kCpu) return cpu::download(ex, values_, device);
  if (there_ == nullptr) there_ = std::make_unique<gpu::Event>();
  gpu::copy(*ex.stream, values_.data, device.data, device.bytes());
  there_->record(*ex.stream);
}

ConstTensorView Landing::wait() {
  if (there_ != nullptr) there_->wait();
  return values_;
}

void write_through_host(Exec& ex, TensorView device, const std::function<void(TensorView)>& fill) {
  switch (ex.device.type) {
    case DeviceType::kCpu:
      return fill(device);
    case DeviceType::kDry:
      return;
    case DeviceType::kCuda:
      const Buffer staging = Buffer::allocate({}, device.bytes(), "staging on the host");
      const TensorView host = staging.view(device.shape, device.dtype);
      fill(host);
      upload(ex, device, host);
  }
}

}  // namespace upmoe::ops
