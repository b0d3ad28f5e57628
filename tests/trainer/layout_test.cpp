// The same ten steps on any number of ranks with any expert-parallel degree, with and without accumulation,
// equal those of one rank. Runs as threads here; under mpirun (layout_test_mpiN) the world is MPI's.

#include <gtest/gtest.h>

#include <mutex>

#include "parallel/runtime.h"
#include "tests/support/golden.h"
#include "trainer/trainer.h"

namespace upmoe {
namespace {

using test::Golden;

constexpr double kLoss = 1e-6, kWeights = 1e-5;

struct Outcome {
  std::vector<double> losses, auxes, norms;
  std::map<std::string, std::vector<float>> weights;  // global, by parameter
};

std::filesystem::path token_path(int rank) {
  return std::filesystem::path(testing::TempDir()) / fmt::format("layout_{}_{}.h5", ::getpid(), rank);
}

void run_rank(Communicator& world, const Golden& golden, std::int64_t micro_batch, int ep,
              Recompute recompute, Outcome& outcome, std::mutex& mutex) {
  RunConfig run = golden.run(token_path(world.rank()), micro_batch, ep);
  run.train.recompute = recompute == Recompute::kBlock ? "block"
                        : recompute == Recompute::kFfn ? "ffn"
                                                       : "none";
  Session session(run, golden.config(), world);
  session.params.load(golden.reader());
  session.optimizer.reset(session.memory.exec);
  session.open_data(0);
  Trainer trainer(session);
  std::vector<StepReport> reports;
  for (std::int64_t step = 1; step <= 10; ++step) reports.push_back(trainer.step(step));
  const std::lock_guard lock(mutex);
  if (world.rank() == 0)
    for (const StepReport& r : reports) {
      outcome.losses.push_back(r.loss);
      outcome.auxes.push_back(r.aux_loss);
      outcome.norms.push_back(r.grad_norm);
    }
  for (const StoredParam& p : session.params.all()) {
    std::vector<float>& whole = outcome.weights[p.spec.name];
    whole.resize(static_cast<std::size_t>(p.spec.shape.elements()));
    const float* values = p.value.as<float>();
    Golden::for_each_index(p.shard, p.spec.shape,
                           [&](std::int64_t at) { whole[static_cast<std::size_t>(at)] = *values++; });
  }
  std::filesystem::remove(token_path(world.rank()));
}

Outcome run_threads(const std::string& name, int ranks, int ep, std::int64_t micro_batch,
                    Recompute recompute = Recompute::kNone) {
  const Golden golden(name);
  Outcome outcome;
  std::mutex mutex;
  run_in_threads(ranks, [&](Communicator& world) {
    run_rank(world, golden, micro_batch, ep, recompute, outcome, mutex);
  });
  return outcome;
}

const Outcome& one_rank(const std::string& name, std::int64_t micro_batch) {
  static std::map<std::pair<std::string, std::int64_t>, Outcome> done;
  auto it = done.find({name, micro_batch});
  if (it == done.end())
    it = done.emplace(std::pair(name, micro_batch), run_threads(name, 1, 1, micro_batch)).first;
  return it->second;
}

void expect_equal(const Outcome& one, const Outcome& many) {
  ASSERT_EQ(one.losses.size(), many.losses.size());
  for (std::size_t i = 0; i < one.losses.size(); ++i) {
    EXPECT_NEAR(many.losses[i], one.losses[i], kLoss * one.losses[i]) << "step " << i + 1;
    EXPECT_NEAR(many.auxes[i], one.auxes[i], kLoss * 10 * std::abs(one.auxes[i])) << "step " << i + 1;
    EXPECT_NEAR(many.norms[i], one.norms[i], 1e-5 * one.norms[i]) << "step " << i + 1;
  }
  for (const auto& [name, expected] : one.weights) {
    if (name.ends_with("attn.k_NH"))
      continue;  // its gradient is rounding alone, and AdamW makes steps of its sign
    const std::vector<float>& found = many.weights.at(name);
    double difference = 0, norm = 0;
    for (std::size_t i = 0; i < expected.size(); ++i) {
      difference += std::pow(double(found[i]) - double(expected[i]), 2);
      norm += std::pow(double(expected[i]), 2);
    }
    EXPECT_LT(std::sqrt(difference / norm), kWeights) << name;
  }
}

struct Layout {
  std::string model;
  int ranks, ep;
  std::int64_t micro_batch;
};

class Layouts : public testing::TestWithParam<Layout> {};

TEST_P(Layouts, EqualsOneRank) {
  const Layout& l = GetParam();
  expect_equal(one_rank(l.model, l.micro_batch), run_threads(l.model, l.ranks, l.ep, l.micro_batch));
}

std::vector<Layout> layouts() {
  std::vector<Layout> all;
  for (const char* model : {"moe_a27b", "moe_odd", "moe_mixed"})
    for (int ranks : {1, 2, 3, 4})
      for (int ep = 1; ep <= ranks; ++ep)
        if (ranks % ep == 0)
          for (std::int64_t micro_batch : {1, 2})
            if (ranks * ep > 1 || micro_batch == 1) all.push_back({model, ranks, ep, micro_batch});
  for (int ranks : {2, 3, 4}) all.push_back({"dense_tied_gqa", ranks, 1, 1});
  return all;
}

INSTANTIATE_TEST_SUITE_P(Threads, Layouts, testing::ValuesIn(layouts()), [](const auto& layout) {
  const Layout& l = layout.param;
  return fmt::format("{}_ranks{}_ep{}_micro{}", l.model, l.ranks, l.ep, l.micro_batch);
});

// Recomputation repeats the same arithmetic: not close, the same.
TEST(RecomputePolicies, Bitwise) {
  const Outcome kept = run_threads("moe_mixed", 2, 2, 1);
  for (Recompute recompute : {Recompute::kFfn, Recompute::kBlock}) {
    const Outcome again = run_threads("moe_mixed", 2, 2, 1, recompute);
    EXPECT_EQ(kept.losses, again.losses);
    EXPECT_EQ(kept.weights, again.weights);
  }
}

// Thread and MPI transports add in the same order, so a run is the same to the bit.
void mpi_equals_threads(Communicator& world) {
  for (const int ep : {1, world.size()}) {
    const Golden golden("moe_a27b");
    Outcome mine;
    std::mutex mutex;
    run_rank(world, golden, 1, ep, Recompute::kNone, mine, mutex);
    if (world.rank() != 0) continue;
    const Outcome threads = run_threads("moe_a27b", world.size(), ep, 1);
    EXPECT_EQ(mine.losses, threads.losses) << "ep " << ep;
    EXPECT_EQ(mine.norms, threads.norms) << "ep " << ep;
    expect_equal(one_rank("moe_a27b", 1), threads);
  }
}

}  // namespace
}  // namespace upmoe

int main(int argc, char** argv) {
  upmoe::Runtime runtime(&argc, &argv);
  testing::InitGoogleTest(&argc, argv);
  if (runtime.world().size() == 1) return RUN_ALL_TESTS();
  upmoe::mpi_equals_threads(runtime.world());
  int failed = testing::UnitTest::GetInstance()->ad_hoc_test_result().Failed() ? 1 : 0;
  return failed;
}
