// Rank r of a world that does not exist: verbs check and book what a real transport would send, and move nothing.

#include <algorithm>

#include "parallel/reduce.h"

namespace upmoe {

namespace {

class DryCommunicator final : public Communicator {
 public:
  DryCommunicator(int rank, int size) : rank_(rank), size_(size) {
    UPMOE_CHECK(0 <= rank && rank < size, "rank {} of {}", rank, size);
  }
  int rank() const override { return rank_; }
  int size() const override { return size_; }

  std::unique_ptr<Communicator> split(int, int) override {
    UPMOE_CHECK(false,
                "a dry communicator cannot be split by colour: its peers cannot be asked; use subgroup()");
    return nullptr;
  }
  std::unique_ptr<Communicator> subgroup(const std::vector<int>& members) override {
    const auto me = std::find(members.begin(), members.end(), rank_);
    UPMOE_CHECK(me != members.end(), "rank {} is not in its own group", rank_);
    auto group = std::make_unique<DryCommunicator>(static_cast<int>(me - members.begin()),
                                                   static_cast<int>(members.size()));
    group->set_ledger(ledger_);
    return group;
  }
  void all_reduce(TensorView inout, ReduceOp, Stream*) override {
    const double share = static_cast<double>(inout.bytes()) / size_;
    book_sent("all_reduce", 2.0 * share * (size_ - 1));
  }
  void broadcast(TensorView inout, int root, Stream*) override {
    UPMOE_CHECK(0 <= root && root < size_, "root {} of {}", root, size_);
    if (root == rank_) book_sent("broadcast", static_cast<double>(inout.bytes()) * (size_ - 1));
  }
  void barrier() override {}
  Pending reduce_scatter(TensorView out, ConstTensorView in, Stream*) override {
    check_reduce_scatter(*this, out, in);
    book_sent("reduce_scatter", static_cast<double>(out.bytes()) * (size_ - 1));
    return {};
  }
  Pending all_gather(TensorView out, ConstTensorView in, Stream*) override {
    check_all_gather(*this, out, in);
    book_sent("all_gather", static_cast<double>(in.bytes()) * (size_ - 1));
    return {};
  }
  Pending all_to_all_rows(TensorView out, std::span<const std::int64_t> recv_rows, ConstTensorView in,
                          std::span<const std::int64_t> send_rows, Stream*) override {
    check_all_to_all_rows(*this, out, recv_rows, in, send_rows);
    const std::int64_t leaving = in.rows() - send_rows[static_cast<std::size_t>(rank_)];
    book_sent("all_to_all_rows",
              static_cast<double>(leaving) * static_cast<double>(row_bytes(in.shape, in.dtype)));
    return {};
  }
  Pending send(ConstTensorView in, int to, Stream*) override {
    check_peer(*this, to);
    book_sent("send", static_cast<double>(in.bytes()));
    return {};
  }
  void recv(TensorView, int from, Stream*) override { check_peer(*this, from); }
  void abort(int) noexcept override {}

 private:
  int rank_, size_;
};

}  // namespace

std::unique_ptr<Communicator> make_dry_communicator(int rank, int size) {
  return std::make_unique<DryCommunicator>(rank, size);
}

}  // namespace upmoe
