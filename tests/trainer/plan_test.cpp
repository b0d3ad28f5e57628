// A plan's memory is what ranks of a real run hold, its books are those of a whole step, and ranks that it takes for
// alike are alike.

#include "trainer/plan/run_plan.h"

#include <gmock/gmock.h>

#include "tests/support/full_size.h"
#include "tests/support/layout_run.h"
#include "trainer/plan/changes.h"
#include "trainer/plan/layout_search.h"
#include "trainer/rehearsal.h"

namespace upmoe::test {
namespace {

namespace fs = std::filesystem;

const fs::path kMachines = fs::path(UPMOE_SOURCE_DIR) / "configs" / "machines";

Machine h100() {
  return read_machine(kMachines / "h100-sxm.yaml");
}

// Every token asks for every expert: the one routing that needs no luck to be balanced.
ModelConfig balanced(const Golden& golden) {
  ModelConfig config = golden.config();
  config.num_experts_per_tok = config.num_experts;
  return config;
}

struct Held {
  MemoryUse use;
  std::size_t scratch_at_ops = 0;  // without what the CPU's backend takes inside of one op
  std::size_t reported = 0;
};

Held run_really(const Golden& golden, const RunConfig& run, Communicator& world) {
  Session s(run, balanced(golden), world);
  s.params.load(s.memory.exec, golden_weights(golden));
  s.optimizer.reset(s.memory.exec);
  s.open_data(0);
  Trainer trainer(s);
  Held held;
  s.memory.ledger.listen([&](std::string_view, const Cost&) {
    held.scratch_at_ops = std::max(held.scratch_at_ops, s.memory.scratch.used());
  });
  for (std::int64_t step = 1; step <= 2; ++step) held.reported = trainer.step(step).tensors_peak;
  trainer.settle();
  s.memory.ledger.listen({});
  held.use = s.memory_use();
  return held;
}

class Planned : public testing::TestWithParam<Layout> {};

TEST_P(Planned, MemoryIsWhatARealRunHolds) {
  const Layout& layout = GetParam();
  const Golden golden(layout.model);
  const int ranks = layout.mesh.world();
  const fs::path tokens = fs::path(testing::TempDir()) / fmt::format("plan_{}.h5", ::getpid());
  const RunConfig run = run_of(layout, golden, tokens);
  golden.write_tokens(tokens);
  std::vector<Held> real(static_cast<std::size_t>(ranks));
  run_in_threads(ranks, [&](Communicator& world) {
    real[static_cast<std::size_t>(world.rank())] = run_really(golden, run, world);
  });
  fs::remove(tokens);
  const RunPlan plan = plan_run(run, balanced(golden), ranks, std::nullopt);
  int all = 0;
  for (const PlannedRank& r : plan.ranks) {
    const Held& held = real[static_cast<std::size_t>(r.rank)];
    const MemoryPurposes& m = r.memory;
    EXPECT_EQ(m.weights, static_cast<double>(held.use.parameters)) << r.rank;
    EXPECT_EQ(m.gradients, static_cast<double>(held.use.gradients)) << r.rank;
    EXPECT_EQ(m.optimizer, static_cast<double>(held.use.optimizer)) << r.rank;
    EXPECT_EQ(m.activations, static_cast<double>(held.use.activations)) << r.rank;
    EXPECT_EQ(m.communication, static_cast<double>(held.use.buckets)) << r.rank;
    EXPECT_EQ(m.workspace, static_cast<double>(held.scratch_at_ops)) << r.rank;
    EXPECT_EQ(m.tensors(), static_cast<double>(held.use.total() - held.use.scratch + held.scratch_at_ops));
    EXPECT_EQ(held.reported, held.use.total()) << r.rank;
    all += r.alike;
  }
  EXPECT_EQ(all, ranks);
  EXPECT_FALSE(plan.time);
}

std::vector<Layout> small_layouts() {
  std::vector<Layout> all;
  for (const auto& policy : kNames<Recompute>.built) {
    all.push_back({"moe_a27b", {1, 1, 1, 1, 1, 1}, 1});
    all.back().recompute = policy.value;
    all.push_back({"moe_a27b", {1, 2, 1, 1, 2, 1}, 1});
    all.back().recompute = policy.value;
  }
  all.push_back({"moe_a27b", {1, 4, 1, 1, 4, 1}, 1});
  all.push_back({"moe_a27b", {2, 1, 1, 2, 1, 1}, 1});
  return all;
}

INSTANTIATE_TEST_SUITE_P(Layouts, Planned, testing::ValuesIn(small_layouts()),
                         [](const auto& i) { return i.param.str() + "_" + name_of(i.param.recompute); });

RunConfig full_size_run() {
  RunConfig run;
  run.data.seq_len = 2048;
  run.train.global_batch = 64;
  run.train.micro_batch = 2;
  run.train.precision = Precision::kBf16;
  run.parallel.reduce = Precision::kBf16;
  return run;
}

TEST(Plan, BooksAreThoseOfAWholeStep) {
  RunConfig run = full_size_run();
  for (const auto& [parallel, world] : {std::pair{RunConfig::Parallel{.ep = 2, .zero = 2}, 2},
                                        {RunConfig::Parallel{.pp = 2}, 2},
                                        {RunConfig::Parallel{.tp = 2, .pp = 2, .pp_chunks = 2}, 4}}) {
    run.parallel = parallel;
    const RunPlan plan = plan_run(run, full_size(), world, std::nullopt);
    for (const PlannedRank& r : plan.ranks) {
      Rehearsal rehearsal(run, full_size(), r.rank, world);
      rehearsal.step();
      const auto& books = rehearsal.step().entries();
      for (const auto& [name, cost] : books) {
        ASSERT_TRUE(r.costs.contains(name)) << name;
        const Cost& planned = r.costs.at(name);
        EXPECT_EQ(planned.calls, cost.calls) << name << " of rank " << r.rank;
        EXPECT_NEAR(planned.flops, cost.flops, 1e-9 * cost.flops) << name;
        EXPECT_NEAR(planned.model_flops, cost.model_flops, 1e-9 * cost.flops) << name;
        EXPECT_NEAR(planned.bytes_sent, cost.bytes_sent, 1e-9 * cost.bytes_sent) << name;
      }
      double sent = 0;
      for (const auto& [verb, bytes] : r.step.sent) sent += bytes.inside + bytes.between;
      EXPECT_NEAR(sent, rehearsal.step().total().bytes_sent, 1e-6 * sent) << "rank " << r.rank;
    }
  }
}

TEST(Plan, WorkOfTheModelIsThatOfAllRanks) {
  RunConfig run = full_size_run();
  run.train.global_batch = 32;
  for (const auto& [parallel, world] : {std::pair{RunConfig::Parallel{.ep = 8}, 8},
                                        {RunConfig::Parallel{.tp = 2, .pp = 2, .cp = 2, .ep = 4}, 16}}) {
    run.parallel = parallel;
    double flops = 0;
    for (int rank = 0; rank < world; ++rank)
      flops += Rehearsal(run, full_size(), rank, world).step().total().model_flops;
    EXPECT_NEAR(plan_run(run, full_size(), world, std::nullopt).model_flops / flops, 1, 1e-9);
  }
}

TEST(Plan, UnevenExpertsAreTwoKindsOfRanks) {
  RunConfig run = full_size_run();
  run.parallel.ep = 8;
  const std::vector<RankKind> kinds = kinds_of_ranks(run, full_size(), 8);
  ASSERT_EQ(kinds.size(), 2u);
  EXPECT_EQ(kinds[0].alike + kinds[1].alike, 8);
  EXPECT_EQ(kinds[0].alike, 4);  // 60 = 4 * 7 + 4 * 8
  const RunPlan plan = plan_run(run, full_size(), 8, std::nullopt);
  EXPECT_EQ(plan.fullest().experts, 8);
  run.parallel.ep = 4;
  EXPECT_EQ(kinds_of_ranks(run, full_size(), 4).size(), 1u);
}

// One rank of each kind holds what every rank of it holds.
TEST(Plan, RanksOfAKindAreAlike) {
  RunConfig run = full_size_run();
  run.parallel = {.tp = 2, .pp = 2, .ep = 4};
  const int world = 8;
  std::multiset<std::size_t> counted, really;
  for (const RankKind& kind : kinds_of_ranks(run, full_size(), world)) {
    Rehearsal rehearsal(run, full_size(), kind.rank, world);
    for (int i = 0; i < kind.alike; ++i) counted.insert(rehearsal.memory_use().parameters);
  }
  for (int rank = 0; rank < world; ++rank)
    really.insert(Rehearsal(run, full_size(), rank, world).memory_use().parameters);
  EXPECT_EQ(counted, really);
}

TEST(Plan, TimeIsMadeOfItsParts) {
  RunConfig run = full_size_run();
  run.parallel.ep = 8;
  const RunPlan plan = plan_run(run, full_size(), 8, h100());
  ASSERT_TRUE(plan.time);
  const PlannedTime& t = *plan.time;
  EXPECT_NEAR(t.seconds, t.compute + t.exchange + t.reduction + t.stages + t.bubble, 1e-9);
  EXPECT_GT(t.exchange, 0);
  EXPECT_GT(t.imbalance, 0) << "7 experts are less work than 8";
  EXPECT_GT(t.mfu, 0.2);
  EXPECT_LT(t.mfu, 0.7);
  EXPECT_DOUBLE_EQ(t.tokens_per_s * t.seconds, plan.tokens);
  EXPECT_EQ(t.bubble, 0);
  run.parallel = {.pp = 4};
  EXPECT_GT(plan_run(run, full_size(), 4, h100()).time->bubble, 0);
}

TEST(Plan, RefusesWithTheCauseAndPossibleMeshes) {
  RunConfig run = full_size_run();
  run.parallel.ep = 7;
  try {
    plan_run(run, full_size(), 8, std::nullopt);
    FAIL();
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ExitCode::kUsage);
    EXPECT_THAT(e.what(),
                testing::AllOf(testing::HasSubstr("parallel.ep: 7"), testing::HasSubstr("possible meshes")));
  }
}

TEST(Plan, ChangesMakeItFitOrFaster) {
  RunConfig run = full_size_run();
  run.parallel.ep = 8;
  run.train.recompute = Recompute::kBlock;
  const RunPlan slow = plan_run(run, full_size(), 8, h100());
  ASSERT_TRUE(slow.fits());
  const std::vector<Change> faster = helpful_changes(run, full_size(), slow, h100());
  ASSERT_FALSE(faster.empty());
  for (const Change& c : faster) {
    EXPECT_TRUE(c.fits);
    EXPECT_LT(c.seconds, slow.time->seconds) << c.keys;
  }
  run.parallel.ep = 1;
  const RunPlan large = plan_run(run, full_size(), 1, h100());
  ASSERT_FALSE(large.fits());
  const std::vector<Change> smaller = helpful_changes(run, full_size(), large, h100());
  ASSERT_FALSE(smaller.empty());
  for (const Change& c : smaller) EXPECT_LT(c.bytes, large.bytes_of(large.fullest())) << c.keys;
}

TEST(LayoutSearch, RanksWhatFitsAndCountsTheRest) {
  RunConfig run = full_size_run();
  const LayoutSearch found = search_layouts(run, full_size(), 8, h100());
  ASSERT_FALSE(found.best.empty());
  EXPECT_LE(found.best.size(), 10u);
  for (std::size_t i = 0; i < found.best.size(); ++i) {
    const FoundLayout& f = found.best[i];
    EXPECT_GE(f.seconds, found.best[i > 0 ? i - 1 : 0].seconds);
    RunConfig chosen = run;
    chosen.parallel = f.parallel;
    chosen.train.micro_batch = f.micro_batch;
    chosen.train.recompute = f.recompute;
    const RunPlan plan = plan_run(chosen, full_size(), 8, h100());
    EXPECT_TRUE(plan.fits());
    EXPECT_DOUBLE_EQ(plan.time->seconds, f.seconds);
  }
  const LayoutSearch::Excluded& x = found.excluded;
  EXPECT_LT(x.impossible + x.across_nodes + x.short_context + x.cut_experts + x.not_reached + x.too_large +
                x.slower,
            found.meshes);
  EXPECT_GT(found.plans, 0);
}

TEST(LayoutSearch, NothingFitsOnTooFew) {
  const LayoutSearch found = search_layouts(full_size_run(), full_size(), 1, h100());
  EXPECT_TRUE(found.best.empty());
  EXPECT_EQ(found.meshes, 1);
  EXPECT_EQ(found.excluded.too_large, 1);
}

}  // namespace
}  // namespace upmoe::test
