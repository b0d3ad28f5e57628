// A mixture gives the same numbers for every expert-parallel degree: tokens are dealt to the ranks in order,
// experts by balanced shares, and output, input gradient and expert gradients must be bitwise those of one
// rank. The router's weight gradient is a sum over ranks and may differ by the order of that sum.

#include <gtest/gtest.h>

#include <mutex>

#include "parallel/layout.h"
#include "parallel/thread_comm.h"
#include "tests/support/forwarding_communicator.h"
#include "tests/support/gradient_check.h"
#include "tests/support/tolerance.h"
#include "trainer/model/moe_layer.h"
#include "trainer/model/softmax_router.h"
#include "trainer/rank_model.h"

namespace upmoe {
namespace {

using test::Host;

struct Weights {
  std::int64_t T = 48, D = 32, F = 12, E = 60, K = 4;
  Host host{11};
  TensorView router = host.normal({E, D}, 0.5), gate_up = host.normal({E, 2 * F, D}, 0.2),
             down = host.normal({E, D, F}, 0.2), x = host.normal({T, D}, 1.0), dy = host.normal({T, D}, 1.0);
};

struct Results {
  std::vector<float> y, dx, gate_up, down, router;
  double crossing_bytes = 0;  // between two halves of the ranks
};

std::vector<float> copy(ConstTensorView v) {
  return {v.as<float>(), v.as<float>() + v.elements()};
}

// Books what crosses between nodes.
class Crossing final : public test::ForwardingCommunicator {
 public:
  Crossing(Communicator& across, Ledger& ledger) : ForwardingCommunicator(across), ledger_(ledger) {}

 private:
  Pending do_all_gather(TensorView out, ConstTensorView in, Stream* stream) override {
    return inner().all_gather(out, in, On(stream, &ledger_));
  }
  Pending do_all_to_all_rows(TensorView out, std::span<const std::int64_t> recv_rows, ConstTensorView in,
                             std::span<const std::int64_t> send_rows, Stream* stream) override {
    return inner().all_to_all_rows(out, recv_rows, in, send_rows, On(stream, &ledger_));
  }
  std::unique_ptr<Communicator> wrap(std::unique_ptr<Communicator> group) override { return group; }
  Ledger& ledger_;
};

// Runs one rank's part and puts it where it belongs in the whole.
void run_rank(Communicator& ep, const Weights& w, int node_ranks, Results& all, std::mutex& mutex) {
  RankMemory memory{Device{}};
  Arena keep(Device{}, std::size_t{1} << 30, "activations");
  Host host(1);
  const Range experts = balanced(w.E, ep.size(), ep.rank()), tokens = balanced(w.T, ep.size(), ep.rank());
  // Bytes that leave a node: those of the rows, or of every exchange that the flat one makes across.
  std::unique_ptr<ProcessMesh> mesh;
  NodeGroups nodes;
  std::unique_ptr<Communicator> across;
  Ledger crossing;
  if (node_ranks > 0) {
    mesh = std::make_unique<ProcessMesh>(MeshSpec{1, ep.size(), 1, 1, ep.size(), 1}, ep, node_ranks);
    across = std::make_unique<Crossing>(*mesh->across_nodes(), crossing);
    nodes = {across.get(), mesh->inside_node()};
  }
  MoeLayer moe;
  moe.num_experts = w.E;
  const Param router{w.router, host.zeros(w.router.shape)};
  moe.router = make_softmax_router({router}, w.K, false);
  moe.exchange = make_exchange({w.E, 1}, ep, nodes);
  const TensorView gate_up = w.gate_up.rows(experts.begin, experts.end),
                   down = w.down.rows(experts.begin, experts.end);
  moe.experts.gate_up_eGD = {gate_up, host.zeros(gate_up.shape)};
  moe.experts.down_eDF = {down, host.zeros(down.shape)};

  MoeLayer::Saved saved;
  RouterBalance balance;
  const TensorView y = host.zeros({tokens.size(), w.D}), dx = host.zeros({tokens.size(), w.D});
  moe.forward(memory.exec, y, w.x.rows(tokens.begin, tokens.end), {}, balance, keep, saved);
  balance.terms.aux = host.zeros({w.E});
  moe.backward(memory.exec, dx, w.dy.rows(tokens.begin, tokens.end), balance, saved);
  ep.all_reduce(router.grad, ReduceOp::kSum);

  const std::lock_guard lock(mutex);
  const auto place = [](std::vector<float>& whole, ConstTensorView part, std::int64_t first_row,
                        std::int64_t rows) {
    const std::int64_t row = part.elements() / std::max<std::int64_t>(1, part.rows());
    whole.resize(static_cast<std::size_t>(rows * row));
    const std::vector<float> values = copy(part);
    std::copy(values.begin(), values.end(), whole.begin() + first_row * row);
  };
  place(all.y, y, tokens.begin, w.T);
  place(all.dx, dx, tokens.begin, w.T);
  place(all.gate_up, moe.experts.gate_up_eGD.grad, experts.begin, w.E);
  place(all.down, moe.experts.down_eDF.grad, experts.begin, w.E);
  all.router = copy(router.grad);
  all.crossing_bytes += crossing.total().bytes_sent;
  if (node_ranks > 0) return;
  // Two nodes: rows out and back, forward and backward, with their weights.
  for (int p = 0; p < ep.size(); ++p)
    if (p / std::max(1, ep.size() / 2) != ep.rank() / std::max(1, ep.size() / 2))
      all.crossing_bytes += static_cast<double>(2 *
                                                (saved.plan.dispatch.send_rows[static_cast<std::size_t>(p)] +
                                                 saved.plan.dispatch.recv_rows[static_cast<std::size_t>(p)]) *
                                                (w.D + 1) * 4);
}

Results run(int ranks, const Weights& w, int node_ranks = 0) {
  Results all;
  std::mutex mutex;
  run_in_threads(ranks, [&](Communicator& ep) { run_rank(ep, w, node_ranks, all, mutex); });
  return all;
}

class MoeLayerRanks : public testing::TestWithParam<int> {};

TEST_P(MoeLayerRanks, BitwiseEqualToOneRank) {
  const Weights w;
  const Results one = run(1, w), many = run(GetParam(), w);
  EXPECT_EQ(one.y, many.y);
  EXPECT_EQ(one.dx, many.dx);
  EXPECT_EQ(one.gate_up, many.gate_up);
  EXPECT_EQ(one.down, many.down);
  ASSERT_EQ(one.router.size(), many.router.size());
  double worst = 0, norm = 0;
  for (std::size_t i = 0; i < one.router.size(); ++i) {
    worst = std::max(worst, std::abs(double(one.router[i]) - double(many.router[i])));
    norm = std::max(norm, std::abs(double(one.router[i])));
  }
  EXPECT_LT(worst, 2e-6 * norm);
}

// Rows that cross to a node once give what rows that go straight to their rank give, and fewer bytes cross.
TEST(NodeExchange, EqualsTheFlatExchange) {
  const Weights w;
  for (const auto& [ranks, node_ranks] : {std::pair{2, 1}, {4, 2}, {8, 4}, {8, 2}, {6, 3}, {4, 4}}) {
    const Results flat = run(ranks, w), nodes = run(ranks, w, node_ranks);
    EXPECT_LT(test::relative_distance(flat.y, nodes.y), 1e-6)
        << ranks << " ranks, " << node_ranks << " a node";
    EXPECT_LT(test::relative_distance(flat.dx, nodes.dx), 1e-6)
        << ranks << " ranks, " << node_ranks << " a node";
    EXPECT_LT(test::relative_distance(flat.gate_up, nodes.gate_up), 1e-6);
    EXPECT_LT(test::relative_distance(flat.down, nodes.down), 1e-6);
    EXPECT_LT(test::relative_distance(flat.router, nodes.router), 1e-6);
    if (ranks == 2 * node_ranks && ranks > 2) {  // top 4 of 60 on two nodes: two choices share a crossing
      EXPECT_LT(nodes.crossing_bytes, 0.8 * flat.crossing_bytes) << ranks << " ranks";
    }
  }
}

INSTANTIATE_TEST_SUITE_P(ExpertParallel, MoeLayerRanks, testing::Values(2, 3, 4, 7, 8));

}  // namespace
}  // namespace upmoe
