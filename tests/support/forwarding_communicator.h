#pragma once
// A communicator that hands every verb on to another one: a base for those that watch, time or break them.

#include <memory>
#include <utility>

#include "parallel/communicator.h"

namespace upmoe::test {

class ForwardingCommunicator : public Communicator {
 public:
  explicit ForwardingCommunicator(Communicator& inner)
      : Communicator(inner.rank(), inner.size()), inner_(inner) {}
  explicit ForwardingCommunicator(std::unique_ptr<Communicator> inner)
      : Communicator(inner->rank(), inner->size()), owned_(std::move(inner)), inner_(*owned_) {}
  std::unique_ptr<Stream> make_stream() override { return inner_.make_stream(); }
  void abort(int code) noexcept override { inner_.abort(code); }

 protected:
  std::unique_ptr<Communicator> do_split(int color, int key) override {
    return wrap(inner().split(color, key));
  }
  std::unique_ptr<Communicator> do_subgroup(const std::vector<int>& members) override {
    return wrap(inner().subgroup(members));
  }
  void do_connect(const std::vector<Route>& routes) override { inner().connect(routes); }
  void do_all_reduce(TensorView inout, ReduceOp op, Stream* stream) override {
    inner().all_reduce(inout, op, stream);
  }
  void do_broadcast(TensorView inout, int root, Stream* stream) override {
    inner().broadcast(inout, root, stream);
  }
  void do_barrier() override { inner().barrier(); }
  Pending do_reduce_scatter(TensorView out, ConstTensorView in, Stream* stream) override {
    return inner().reduce_scatter(out, in, stream);
  }
  Pending do_all_gather(TensorView out, ConstTensorView in, Stream* stream) override {
    return inner().all_gather(out, in, stream);
  }
  Pending do_all_to_all_rows(TensorView out, std::span<const std::int64_t> recv_rows, ConstTensorView in,
                             std::span<const std::int64_t> send_rows, Stream* stream) override {
    return inner().all_to_all_rows(out, recv_rows, in, send_rows, stream);
  }
  Pending do_send(std::span<const ConstTensorView> in, int to, Stream* stream) override {
    return inner().send(in, to, stream);
  }
  void do_recv(std::span<const TensorView> out, int from, Stream* stream) override {
    inner().recv(out, from, stream);
  }

  // The same kind of communicator around a group of it.
  virtual std::unique_ptr<Communicator> wrap(std::unique_ptr<Communicator> group) = 0;
  Communicator& inner() { return inner_; }

 private:
  std::unique_ptr<Communicator> owned_;
  Communicator& inner_;
};

}  // namespace upmoe::test
