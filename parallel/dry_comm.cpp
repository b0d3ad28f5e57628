#include "parallel/dry_comm.h"

#include <algorithm>

namespace upmoe {

namespace {

class DryCommunicator final : public Communicator {
 public:
  DryCommunicator(int rank, int size) : Communicator(rank, size) {}
  void abort(int) noexcept override {}

 private:
  std::unique_ptr<Communicator> do_split(int, int) override {
    UPMOE_CHECK(false,
                "a dry communicator cannot be split by colour: its peers cannot be asked; use subgroup()");
    return nullptr;
  }
  std::unique_ptr<Communicator> do_subgroup(const std::vector<int>& members) override {
    const auto me = std::find(members.begin(), members.end(), rank());
    return make_dry_communicator(static_cast<int>(me - members.begin()), static_cast<int>(members.size()));
  }
  void do_all_reduce(TensorView, ReduceOp, Stream*) override {}
  void do_broadcast(TensorView, int, Stream*) override {}
  void do_barrier() override {}
  Pending do_reduce_scatter(TensorView, ConstTensorView, Stream*) override { return {}; }
  Pending do_all_gather(TensorView, ConstTensorView, Stream*) override { return {}; }
  Pending do_all_to_all_rows(TensorView, std::span<const std::int64_t>, ConstTensorView,
                             std::span<const std::int64_t>, Stream*) override {
    return {};
  }
  Pending do_send(ConstTensorView, int, Stream*) override { return {}; }
  void do_recv(TensorView, int, Stream*) override {}
};

}  // namespace

std::unique_ptr<Communicator> make_dry_communicator(int rank, int size) {
  return std::make_unique<DryCommunicator>(rank, size);
}

}  // namespace upmoe
