#pragma once
// A communicator whose verbs take tensors on the host and do their work on the rank's GPU: so that the tests
// of the verbs are those of the CPU.

#include <deque>

#include "kernels/core/gpu.h"
#include "kernels/core/memory.h"
#include "parallel/communicator.h"
#include "parallel/nccl_comm.h"

namespace upmoe {

class OnGpu final : public Communicator {
 public:
  explicit OnGpu(std::unique_ptr<Communicator> inner)
      : Communicator(inner->rank(), inner->size()),
        inner_(std::move(inner)),
        device_{DeviceType::kCuda, gpu::current()},
        stream_(gpu::make_stream()) {}
  ~OnGpu() override { stream_->synchronize(); }
  void abort(int code) noexcept override { inner_->abort(code); }

 private:
  std::unique_ptr<Communicator> do_split(int color, int key) override {
    return std::make_unique<OnGpu>(inner_->split(color, key));
  }
  void do_connect(const std::vector<Route>& routes) override { inner_->connect(routes); }
  void do_all_reduce(TensorView inout, ReduceOp op, Stream*) override {
    const Copy copy(*this, inout, inout);
    inner_->all_reduce(copy.view(inout), op, stream_.get());
    copy.back(inout);
  }
  void do_broadcast(TensorView inout, int root, Stream*) override {
    const Copy copy(*this, inout, inout);
    inner_->broadcast(copy.view(inout), root, stream_.get());
    copy.back(inout);
  }
  void do_barrier() override { inner_->barrier(); }
  Pending do_reduce_scatter(TensorView out, ConstTensorView in, Stream*) override {
    return two(out, in,
               [&](TensorView o, ConstTensorView i) { return inner_->reduce_scatter(o, i, stream_.get()); });
  }
  Pending do_all_gather(TensorView out, ConstTensorView in, Stream*) override {
    if (out.data <= in.data && in.data + in.bytes() <= out.data + out.bytes()) {  // in place
      const auto copy = std::make_shared<Copy>(*this, out, out);
      ConstTensorView piece = copy->view(out);
      piece.data += in.data - out.data;
      piece.shape = in.shape;
      return finish(inner_->all_gather(copy->view(out), piece, stream_.get()), copy, out);
    }
    return two(out, in,
               [&](TensorView o, ConstTensorView i) { return inner_->all_gather(o, i, stream_.get()); });
  }
  Pending do_all_to_all_rows(TensorView out, std::span<const std::int64_t> recv_rows, ConstTensorView in,
                             std::span<const std::int64_t> send_rows, Stream*) override {
    return two(out, in, [&](TensorView o, ConstTensorView i) {
      return inner_->all_to_all_rows(o, recv_rows, i, send_rows, stream_.get());
    });
  }
  Pending do_send(std::span<const ConstTensorView> in, int to, Stream*) override {
    auto copies = std::make_shared<std::deque<Copy>>();
    std::vector<ConstTensorView> views;
    for (const ConstTensorView& t : in) views.push_back(copies->emplace_back(*this, t, t).view(t));
    auto sent = std::make_shared<Pending>(inner_->send(views, to, stream_.get()));
    return Pending([this, sent, copies] {
      sent->wait();
      stream_->synchronize();
    });
  }
  void do_recv(std::span<const TensorView> out, int from, Stream*) override {
    std::deque<Copy> copies;
    std::vector<TensorView> views;
    for (const TensorView& t : out) views.push_back(copies.emplace_back(*this, t, t).view(t));
    inner_->recv(views, from, stream_.get());
    for (std::size_t i = 0; i < out.size(); ++i) copies[i].back(out[i]);
  }

  // Memory on the GPU that holds what a tensor on the host holds.
  class Copy {
   public:
    Copy(const OnGpu& owner, const ConstTensorView& like, const ConstTensorView& contents)
        : owner_(owner), memory_(Buffer::allocate(owner.device_, std::max<std::size_t>(like.bytes(), 1))) {
      if (contents.bytes() > 0 && contents.data != nullptr)
        gpu::copy(*owner.stream_, memory_.data(), contents.data, contents.bytes());
    }
    ~Copy() { owner_.stream_->synchronize(); }
    TensorView view(const ConstTensorView& like) const { return memory_.view(like.shape, like.dtype); }
    void back(const TensorView& host) const {
      if (host.data != nullptr && host.bytes() > 0)
        gpu::copy(*owner_.stream_, host.data, memory_.data(), host.bytes());
      owner_.stream_->synchronize();
    }

   private:
    const OnGpu& owner_;
    Buffer memory_;
  };

  template <class Verb>
  Pending two(const TensorView& out, const ConstTensorView& in, const Verb& verb) {
    const auto from = std::make_shared<Copy>(*this, in, in), to = std::make_shared<Copy>(*this, out, out);
    Pending pending = verb(to->view(out), from->view(in));
    return finish(std::move(pending), to, out, from);
  }
  static Pending finish(Pending started, std::shared_ptr<Copy> copy, TensorView out,
                        std::shared_ptr<Copy> kept = {}) {
    auto pending = std::make_shared<Pending>(std::move(started));
    return Pending([pending, copy = std::move(copy), kept = std::move(kept), out] {
      pending->wait();
      copy->back(out);
    });
  }

  std::unique_ptr<Communicator> inner_;
  Device device_;
  std::unique_ptr<Stream> stream_;
};

}  // namespace upmoe
