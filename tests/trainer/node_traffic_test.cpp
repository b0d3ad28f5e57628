// What crosses between nodes in the exchange of expert rows: flat, every choice of an expert elsewhere is a
// row; by nodes, every pair of a token and a node with any of its experts is one.

#include <gtest/gtest.h>

#include <cmath>

#include "parallel/thread_comm.h"
#include "tests/support/forwarding_communicator.h"
#include "tests/support/layout_run.h"

namespace upmoe {
namespace {

using test::Golden;
using test::Layout;

constexpr int kRanks = 4, kNodeRanks = 2;

// Books the rows of all_to_all_rows that leave the node, in bytes, in a ledger of its own.
class CrossingCommunicator final : public test::ForwardingCommunicator {
 public:
  CrossingCommunicator(Communicator& world, Ledger& crossing)
      : ForwardingCommunicator(world), crossing_(crossing) {
    for (int r = 0; r < world.size(); ++r) members_.push_back(r);
  }
  CrossingCommunicator(std::unique_ptr<Communicator> group, std::vector<int> members, Ledger& crossing)
      : ForwardingCommunicator(std::move(group)), members_(std::move(members)), crossing_(crossing) {}

 private:
  std::unique_ptr<Communicator> do_subgroup(const std::vector<int>& members) override {
    std::vector<int> in_world;
    for (const int m : members) in_world.push_back(members_[static_cast<std::size_t>(m)]);
    return std::make_unique<CrossingCommunicator>(inner().subgroup(members), in_world, crossing_);
  }
  Pending do_all_to_all_rows(TensorView out, std::span<const std::int64_t> recv_rows, ConstTensorView in,
                             std::span<const std::int64_t> send_rows, Stream* stream) override {
    const int here = members_[static_cast<std::size_t>(rank())] / kNodeRanks;
    const double row = in.rows() > 0 ? double(in.bytes()) / double(in.rows()) : 0.0;
    for (std::size_t p = 0; p < send_rows.size(); ++p)
      if (members_[p] / kNodeRanks != here)
        crossing_.book_sent(fmt::format("rows of {} bytes", row), double(send_rows[p]) * row);
    return ForwardingCommunicator::do_all_to_all_rows(out, recv_rows, in, send_rows, stream);
  }
  std::unique_ptr<Communicator> wrap(std::unique_ptr<Communicator>) override {
    fail(ExitCode::kFailure, "a group whose members are not told");
  }
  std::vector<int> members_;
  Ledger& crossing_;
};

// Bytes of token rows that cross between nodes in one step, over all ranks.
double crossing_bytes(const std::string& model, int node_ranks) {
  const Golden golden(model);
  Layout layout{model, {1, kRanks, 1, 1, kRanks, 1}, 1};
  layout.node_ranks = node_ranks;
  layout.steps = 1;
  test::Outcome outcome;
  std::mutex mutex;
  double bytes = 0;
  const std::string token_rows =
      fmt::format("rows of {} bytes", 4.0 * static_cast<double>(golden.config().hidden_size));
  run_in_threads(kRanks, [&](Communicator& world) {
    Ledger crossing;
    CrossingCommunicator counted(world, crossing);
    test::run_rank(counted, golden, layout, outcome, mutex);
    const std::lock_guard lock(mutex);
    for (const auto& [name, cost] : crossing.entries())
      if (name == token_rows) bytes += cost.bytes_sent;
  });
  return bytes;
}

TEST(NodeTraffic, ARowCrossesOnce) {
  const Golden golden("moe_a27b");
  const double row = 4.0 * static_cast<double>(golden.config().hidden_size),
               ways = 4;  // there and back, forward and backward
  const double tokens =   // of all layers
      4.0 * static_cast<double>(golden.seq_len()) * golden.config().num_moe_layers();
  const double flat = crossing_bytes("moe_a27b", 0) / (row * ways),
               by_nodes = crossing_bytes("moe_a27b", kNodeRanks) / (row * ways);
  fmt::print("rows that cross, per token and layer: {:.2f} flat, {:.2f} by nodes\n", flat / tokens,
             by_nodes / tokens);
  EXPECT_EQ(flat, std::floor(flat));
  EXPECT_EQ(by_nodes, std::floor(by_nodes));
  EXPECT_LE(by_nodes, tokens) << "one other node";
  // Top 4 of 60 experts, half of them elsewhere: 2 choices of a token on average, and for 15 of 16 tokens any.
  EXPECT_NEAR(flat / tokens, 2.0, 0.4);
  EXPECT_NEAR(by_nodes / tokens, 15.0 / 16, 0.1);
}

}  // namespace
}  // namespace upmoe
