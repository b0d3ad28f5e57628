#include "parallel/dry_comm.h"

#include <algorithm>
#include <array>
#include <numeric>
#include <utility>

namespace upmoe {

namespace {

std::vector<int> everybody(int size) {
  std::vector<int> ranks(static_cast<std::size_t>(size));
  std::iota(ranks.begin(), ranks.end(), 0);
  return ranks;
}

class DryCommunicator final : public Communicator {
 public:
  DryCommunicator(int rank, std::vector<int> members, DryWire* wire)
      : Communicator(rank, static_cast<int>(members.size())), members_(std::move(members)), wire_(wire) {}
  void abort(int) noexcept override {}

 private:
  std::unique_ptr<Communicator> do_split(int, int) override {
    UPMOE_CHECK(false,
                "a dry communicator cannot be split by colour: its peers cannot be asked; use subgroup()");
    return nullptr;
  }
  std::unique_ptr<Communicator> do_subgroup(const std::vector<int>& members) override {
    const auto me = std::find(members.begin(), members.end(), rank());
    std::vector<int> of_world;
    for (const int m : members) of_world.push_back(members_[static_cast<std::size_t>(m)]);
    return std::make_unique<DryCommunicator>(static_cast<int>(me - members.begin()), std::move(of_world),
                                             wire_);
  }
  // Each other member is sent its slice, and the sum of the own one.
  void do_all_reduce(TensorView inout, ReduceOp, Stream*) override {
    wait_for("all_reduce", 2.0 * static_cast<double>(inout.bytes()) / size());
  }
  void do_broadcast(TensorView inout, int root, Stream*) override {
    wait_for("broadcast", root == rank() ? static_cast<double>(inout.bytes()) : 0.0);
  }
  void do_barrier() override {}
  Pending do_reduce_scatter(TensorView out, ConstTensorView, Stream*) override {
    return begin({.verb = "reduce_scatter", .each = static_cast<double>(out.bytes())});
  }
  Pending do_all_gather(TensorView, ConstTensorView in, Stream*) override {
    return begin({.verb = "all_gather", .each = static_cast<double>(in.bytes())});
  }
  Pending do_all_to_all_rows(TensorView, std::span<const std::int64_t>, ConstTensorView in,
                             std::span<const std::int64_t> send_rows, Stream*) override {
    return begin(
        {.verb = "all_to_all_rows", .rows = send_rows, .row_bytes = static_cast<double>(row_bytes(in))});
  }
  // To and from one peer, in a group of two.
  Pending do_send(std::span<const ConstTensorView> in, int to, Stream*) override {
    return between({.verb = "send", .each = static_cast<double>(bytes_together(in))}, to);
  }
  void do_recv(std::span<const TensorView>, int from, Stream*) override {
    between({.verb = "recv"}, from).wait();
  }

  Pending begin(DryTransfer transfer) {
    if (wire_ == nullptr) return {};
    transfer.members = members_;
    transfer.me = rank();
    return Pending(wire_->begin(transfer));
  }
  void wait_for(const char* verb, double each) { begin({.verb = verb, .each = each}).wait(); }
  Pending between(DryTransfer transfer, int peer) {
    if (wire_ == nullptr) return {};
    const std::array pair{members_[static_cast<std::size_t>(std::min(peer, rank()))],
                          members_[static_cast<std::size_t>(std::max(peer, rank()))]};
    transfer.members = pair;
    transfer.me = rank() < peer ? 0 : 1;
    return Pending(wire_->begin(transfer));
  }

  std::vector<int> members_;
  DryWire* wire_;
};

}  // namespace

std::unique_ptr<Communicator> make_dry_communicator(int rank, int size, DryWire* wire) {
  UPMOE_CHECK(0 <= rank && rank < size, "rank {} of {}", rank, size);
  return std::make_unique<DryCommunicator>(rank, everybody(size), wire);
}

}  // namespace upmoe
