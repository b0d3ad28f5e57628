// One rank alone: every verb is a copy to itself.

#include <cstring>

#include "kernels/core/gpu.h"
#include "parallel/reduce.h"
#include "parallel/watchdog.h"

namespace upmoe {

namespace {

void copy_unless_same(const TensorView& out, const ConstTensorView& in, Stream* stream) {
  if (out.data == in.data || in.bytes() == 0 || out.data == nullptr) return;
  if (in.device.type == DeviceType::kCuda) {
    UPMOE_CHECK(stream != nullptr, "a transfer on a GPU has a stream");
    gpu::copy(*stream, out.data, in.data, in.bytes());
  } else {
    std::memmove(out.data, in.data, in.bytes());
  }
}

// An op is progress.
class WatchedStream final : public Stream {
 public:
  void poll() override { watchdog::heartbeat(); }
};

class SelfCommunicator final : public Communicator {
 public:
  int rank() const override { return 0; }
  int size() const override { return 1; }
  std::unique_ptr<Communicator> split(int, int) override {
    auto self = make_self_communicator();
    self->set_ledger(ledger_);
    return self;
  }
  void all_reduce(TensorView, ReduceOp, Stream*) override {}
  void broadcast(TensorView, int root, Stream*) override { UPMOE_CHECK(root == 0, "root {} of 1", root); }
  void barrier() override {}
  Pending reduce_scatter(TensorView out, ConstTensorView in, Stream* stream) override {
    check_reduce_scatter(*this, out, in);
    copy_unless_same(out, in, stream);
    return {};
  }
  Pending all_gather(TensorView out, ConstTensorView in, Stream* stream) override {
    check_all_gather(*this, out, in);
    copy_unless_same(out, in, stream);
    return {};
  }
  Pending all_to_all_rows(TensorView out, std::span<const std::int64_t> recv_rows, ConstTensorView in,
                          std::span<const std::int64_t> send_rows, Stream* stream) override {
    check_all_to_all_rows(*this, out, recv_rows, in, send_rows);
    copy_unless_same(out, in, stream);
    return {};
  }
  Pending send(ConstTensorView, int to, Stream*) override {
    UPMOE_CHECK(false, "send to rank {} of 1", to);
    return {};
  }
  void recv(TensorView, int from, Stream*) override { UPMOE_CHECK(false, "receive from rank {} of 1", from); }
  std::unique_ptr<Stream> make_stream() override { return std::make_unique<WatchedStream>(); }
  void abort(int) noexcept override {}
};

}  // namespace

std::unique_ptr<Communicator> make_self_communicator() {
  return std::make_unique<SelfCommunicator>();
}

}  // namespace upmoe
