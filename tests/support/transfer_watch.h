#pragma once
// The order of ops and transfers: what a transfer reads may not be written while it is under way, what it
// writes may not be touched. On the CPU a mistake of this kind often goes unnoticed, because a transfer
// between threads may have happened already; on a GPU it is a race.

#include <fmt/format.h>

#include <list>

#include "tests/support/forwarding_communicator.h"

namespace upmoe::test {

class TransferWatch final : public OpWatcher {
 public:
  struct Transfer {
    std::string verb;
    ConstTensorView in;
    TensorView out;
  };
  using Handle = std::list<Transfer>::iterator;

  void reads(const ConstTensorView& t) override { check(t, false, "an op"); }
  void writes(const TensorView& t) override { check(t, true, "an op"); }
  // A transfer begins: it reads and writes like an op, and goes on.
  Handle begin(const std::string& verb, ConstTensorView in, TensorView out) {
    check(in, false, verb);
    check(out, true, verb);
    ++transfers_;
    most_ = std::max(most_, under_way_.size() + 1);
    return under_way_.insert(under_way_.end(), {verb, in, out});
  }
  void end(Handle handle) { under_way_.erase(handle); }

  const std::vector<std::string>& mistakes() const { return mistakes_; }
  std::size_t transfers() const { return transfers_; }
  std::size_t most_under_way() const { return most_; }

 private:
  static bool overlap(const ConstTensorView& a, const ConstTensorView& b) {
    return a.data != nullptr && b.data != nullptr && a.data < b.data + b.bytes() &&
           b.data < a.data + a.bytes();
  }
  void check(const ConstTensorView& t, bool writes, const std::string& who) {
    for (const Transfer& u : under_way_) {
      const bool of_out = overlap(t, u.out), of_in = writes && overlap(t, u.in);
      if (of_out || of_in)
        mistakes_.push_back(fmt::format("{} {} {} {}, which a {} that is under way {}", who,
                                        writes ? "writes" : "reads", name_of(t.dtype), t.shape.str(), u.verb,
                                        of_out ? "writes" : "reads"));
    }
  }
  std::list<Transfer> under_way_;
  std::vector<std::string> mistakes_;
  std::size_t transfers_ = 0, most_ = 0;
};

class WatchedCommunicator final : public ForwardingCommunicator {
 public:
  WatchedCommunicator(Communicator& inner, TransferWatch& watch)
      : ForwardingCommunicator(inner), watch_(watch) {}
  WatchedCommunicator(std::unique_ptr<Communicator> inner, TransferWatch& watch)
      : ForwardingCommunicator(std::move(inner)), watch_(watch) {}

  void all_reduce(TensorView inout, ReduceOp op, Stream* stream) override {
    watch_.writes(inout);
    inner().all_reduce(inout, op, stream);
  }
  void broadcast(TensorView inout, int root, Stream* stream) override {
    watch_.writes(inout);
    inner().broadcast(inout, root, stream);
  }
  void recv(TensorView out, int from, Stream* stream) override {
    watch_.writes(out);
    inner().recv(out, from, stream);
  }
  Pending reduce_scatter(TensorView out, ConstTensorView in, Stream* stream) override {
    return watched("reduce_scatter", in, out, inner().reduce_scatter(out, in, stream));
  }
  Pending all_gather(TensorView out, ConstTensorView in, Stream* stream) override {
    return watched("all_gather", in, out, inner().all_gather(out, in, stream));
  }
  Pending all_to_all_rows(TensorView out, std::span<const std::int64_t> recv_rows, ConstTensorView in,
                          std::span<const std::int64_t> send_rows, Stream* stream) override {
    return watched("all_to_all_rows", in, out,
                   inner().all_to_all_rows(out, recv_rows, in, send_rows, stream));
  }
  Pending send(ConstTensorView in, int to, Stream* stream) override {
    return watched("send", in, {}, inner().send(in, to, stream));
  }

 protected:
  std::unique_ptr<Communicator> wrap(std::unique_ptr<Communicator> group) override {
    return std::make_unique<WatchedCommunicator>(std::move(group), watch_);
  }

 private:
  Pending watched(const std::string& verb, ConstTensorView in, TensorView out, Pending pending) {
    const auto handle = watch_.begin(verb, in, out);
    auto inner = std::make_shared<Pending>(std::move(pending));
    return Pending([this, handle, inner] {
      inner->wait();
      watch_.end(handle);
    });
  }
  TransferWatch& watch_;
};

}  // namespace upmoe::test
