// No memory of gradients is cleared: whoever has the first gradient of a step writes over what stands there. Filled
// with NaN before a run, it changes no bit of what the run computes, under meshes of every kind.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "parallel/self_comm.h"
#include "tests/support/layout_run.h"

namespace upmoe {
namespace {

using test::Golden;
using test::Layout;
using test::Outcome;

void poison(Session& s) {
  for (const StoredParam& p : s.params.all()) {
    if (!p.grad.given()) continue;
    ops::fill(s.memory.exec, p.grad, NAN);
    ops::fill(s.memory.exec, p.owned_grad, NAN);
  }
}

// Against memory of zeros, to which adding and writing are the same.
void expect_nothing_read(const Layout& l) {
  SCOPED_TRACE(fmt::format("{} zero{} {} {}", l.str(), l.zero, name_of(l.recompute), name_of(l.precision)));
  const Outcome expected = test::run_in_layout(l), found = test::run_in_layout(l, poison);
  EXPECT_TRUE(
      std::all_of(found.losses.begin(), found.losses.end(), [](double x) { return std::isfinite(x); }));
  EXPECT_EQ(expected.losses, found.losses);
  EXPECT_EQ(expected.norms, found.norms);
  EXPECT_EQ(expected.gradients, found.gradients);
  EXPECT_EQ(expected.weights, found.weights);
}

Layout short_run(Layout l) {
  l.steps = 2;
  return l;
}

TEST(GradientMemory, IsNotReadBeforeItIsWritten) {
  for (const Layout& each : test::layouts_of_every_kind()) {
    Layout l = short_run(each);
    expect_nothing_read(l);
    l.precision = Precision::kBf16;
    expect_nothing_read(l);
  }
}

// Two writers of one gradient, on one rank and on the two ends of a pipeline; biases; norms of heads; experts behind a
// sigmoid; ranks that share blocks' memory, with several micro-batches.
TEST(GradientMemory, OfOtherModels) {
  for (const char* model : {"dense_tied_gqa", "moe_odd", "qwen3_moe", "deepseek", "mixtral", "dots1", "dbrx"})
    for (const MeshSpec& mesh :
         {MeshSpec{1, 1, 1, 1, 1, 1}, MeshSpec{2, 1, 1, 1, 1, 1}, MeshSpec{1, 2, 1, 1, 1, 1}}) {
      Layout l = short_run({model, mesh, 1});
      l.zero = mesh.dp > 1 ? 2 : 1;
      if (test::is_possible(l, Golden(model))) expect_nothing_read(l);
    }
}

Session session_of(const Golden& golden, Communicator& world, RunConfig run = {}) {
  run.data.seq_len = golden.seq_len();
  return Session(run, golden.config(), world, Device{});
}

// What takes part in no product of a step: zeros, before anybody reads it.
TEST(GradientMemory, WithoutAWriterIsZero) {
  if (test::on_gpu()) GTEST_SKIP() << "of the host's memory";
  const Golden golden("moe_a27b");
  const auto self = make_self_communicator();
  Session s = session_of(golden, *self);
  poison(s);
  s.params.forget_gradients();
  for (int layer = -1; layer < golden.config().num_hidden_layers; ++layer)
    s.reducer.ready(s.memory.exec, layer, true);
  s.reducer.finish(s.memory.exec);
  EXPECT_EQ(s.optimizer.first_nonfinite(s.memory.exec), "");
  EXPECT_EQ(s.optimizer.gradient_norm(s.memory.exec, *self), 0);
}

TEST(GradientMemory, FirstWriterOverwritesOthersAdd) {
  const Golden golden("dense_tied_gqa");
  const auto self = make_self_communicator();
  Session s = session_of(golden, *self);
  const Param q = s.params.at("layers.0.attn.q_NHD").whole();
  s.params.forget_gradients();
  EXPECT_EQ(q.write_grad().mode, Accumulate::kOverwrite);
  EXPECT_EQ(q.write_grad().mode, Accumulate::kAdd);
  EXPECT_EQ(s.params.at("layers.0.attn.q_NHD").whole().write_grad().mode, Accumulate::kAdd)
      << "the memory is the same";
  s.params.forget_gradients();
  EXPECT_EQ(q.write_grad().mode, Accumulate::kOverwrite);
  EXPECT_EQ((Param{q.value, q.grad}.write_grad().mode), Accumulate::kAdd) << "of nobody's step";
  EXPECT_FALSE((Param{q.value, {}}.write_grad().given()));
}

// Where nothing else is filled, no fill is booked.
TEST(GradientMemory, IsNotCleared) {
  const Golden golden("moe_a27b");
  Outcome outcome;
  std::mutex mutex;
  run_in_threads(1, [&](Communicator& world) {
    test::run_rank(world, golden, short_run({"moe_a27b", {}, 1}), outcome, mutex, {}, [](Session& s) {
      EXPECT_TRUE(s.memory.ledger.entries().contains("gemm"));
      EXPECT_FALSE(s.memory.ledger.entries().contains("fill"));
    });
  });
}

}  // namespace
}  // namespace upmoe
