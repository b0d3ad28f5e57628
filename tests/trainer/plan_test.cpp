// A plan's memory is what ranks of a real run hold, its books are those of a whole step, and ranks that it takes for
// alike are alike.

#include "trainer/plan/run_plan.h"

#include <gmock/gmock.h>

#include "tests/support/full_size.h"
#include "tests/trainer/balanced_run.h"
#include "trainer/cost/model_cost.h"
#include "trainer/plan/changes.h"
#include "trainer/plan/layout_search.h"
#include "trainer/rehearsal.h"

namespace upmoe::test {
namespace {

const fs::path kMachines = fs::path(UPMOE_SOURCE_DIR) / "configs" / "machines";

Machine h100() {
  return read_machine(kMachines / "h100-sxm.yaml");
}

class Planned : public testing::TestWithParam<Layout> {};

TEST_P(Planned, MemoryIsWhatARealRunHolds) {
  const BalancedRun real = run_balanced(GetParam());
  const int ranks = static_cast<int>(real.ranks.size());
  const RunPlan plan = plan_run(real.run, real.config, ranks, std::nullopt);
  int all = 0;
  for (const PlannedRank& r : plan.ranks) {
    const RankSeen& held = real.ranks[static_cast<std::size_t>(r.rank)];
    const MemoryPurposes& m = r.memory;
    EXPECT_EQ(m.weights, static_cast<double>(held.memory.parameters)) << r.rank;
    EXPECT_EQ(m.gradients, static_cast<double>(held.memory.gradients)) << r.rank;
    EXPECT_EQ(m.optimizer, static_cast<double>(held.memory.optimizer)) << r.rank;
    EXPECT_EQ(m.activations, static_cast<double>(held.memory.activations)) << r.rank;
    EXPECT_EQ(m.communication, static_cast<double>(held.memory.buckets)) << r.rank;
    EXPECT_EQ(m.workspace, static_cast<double>(held.scratch_at_ops)) << r.rank;
    EXPECT_EQ(m.tensors(),
              static_cast<double>(held.memory.total() - held.memory.scratch + held.scratch_at_ops));
    EXPECT_EQ(held.reported, held.memory.total()) << r.rank;
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
  all.push_back(of_three_experts({1, 4, 1, 1, 4, 1}));
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

// What one micro-batch adds is added for many, each time with a rounding.
void expect_nearly(const Cost& planned, const Cost& booked, const std::string& where) {
  EXPECT_EQ(planned.calls, booked.calls) << where;
  for (const auto& [one, other] : {std::pair{planned.flops, booked.flops},
                                   {planned.bytes_read, booked.bytes_read},
                                   {planned.bytes_written, booked.bytes_written},
                                   {planned.bytes_sent, booked.bytes_sent},
                                   {planned.model_flops, booked.model_flops},
                                   {planned.model_again, booked.model_again},
                                   {planned.teacher_flops, booked.teacher_flops}})
    EXPECT_NEAR(one, other, 1e-9 * other) << where;
}

TEST(Plan, BooksAreThoseOfAWholeStep) {
  RunConfig run = full_size_run();
  run.train.recompute = Recompute::kRoutedUp;
  for (const auto& [parallel, world] : {std::pair{RunConfig::Parallel{.ep = 2, .zero = 2}, 2},
                                        {RunConfig::Parallel{.pp = 2}, 2},
                                        {RunConfig::Parallel{.tp = 2, .pp = 2, .pp_chunks = 2}, 4}}) {
    run.parallel = parallel;
    const RunPlan plan = plan_run(run, full_size(), world, std::nullopt);
    for (const PlannedRank& r : plan.ranks) {
      Rehearsal rehearsal(run, full_size(), r.rank, world);
      rehearsal.step();
      const auto& books = rehearsal.step().entries();
      EXPECT_EQ(r.costs.size(), books.size()) << "rank " << r.rank;
      for (const auto& [name, cost] : books) {
        ASSERT_TRUE(r.costs.contains(name)) << name;
        expect_nearly(r.costs.at(name), cost, fmt::format("{} of rank {}", name, r.rank));
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

// Of a token what `upmoe cost` says, in every family and of routers that route groups.
TEST(Plan, WorkOfTheModelIsThatOfItsCost) {
  for (const std::string& name : golden_cases()) {
    const Golden golden(name);
    const RunPlan plan = plan_run(run_of({name, {}}, golden, "unused"), golden.config(), 1, std::nullopt);
    EXPECT_DOUBLE_EQ(plan.model_flops / plan.tokens,
                     model_cost(golden.config(), {.seq_len = golden.seq_len()}).train_flops)
        << name;
  }
  const Golden golden("moe_mixed");
  for (const auto& kind : kNames<RouterKind>.built) {
    Layout layout{"moe_mixed", {}, 2};
    layout.aux_loss = 0;
    layout.with_form().kind = kind.value;
    if (!layout.own_form().routes_groups()) continue;
    layout.with_form().group_size = 2;
    const ModelConfig config = config_of(layout, golden);
    const RunPlan plan = plan_run(run_of(layout, golden, "unused"), config, 1, std::nullopt);
    EXPECT_DOUBLE_EQ(plan.model_flops / plan.tokens,
                     model_cost(config, {.seq_len = golden.seq_len()}).train_flops)
        << kind.name;
  }
}

// So that it is rehearsed once for all that are compared.
TEST(Plan, WorkOfTheModelIsTheSameInEveryLayout) {
  RunConfig run = full_size_run();
  const double flops = plan_run(run, full_size(), 1, std::nullopt).model_flops;
  run.train.micro_batch = 8;
  run.train.recompute = Recompute::kBlock;
  run.optimizer.name = OptimizerKind::kAdamW8bit;
  run.parallel = {.ep = 2, .zero = 2};
  EXPECT_EQ(plan_run(run, full_size(), 2, std::nullopt).model_flops, flops);
  EXPECT_EQ(plan_run(run, full_size(), 2, std::nullopt, {.ranks = {0}, .flops = {{5, 0}}}).model_flops, 5);
}

// Of three ranks one has a micro-batch less, and the one that stands for them does not say so.
TEST(Plan, WorkOfATeacherIsItsForwardOverTheBatch) {
  RunConfig run = full_size_run();
  run.train.teacher.model = "a teacher";
  run.train.teacher.config = std::make_shared<const ModelConfig>(full_size());
  const double forward = rehearse_forward(full_size(), run.data.seq_len).total().model_flops;
  for (const int world : {1, 3}) {
    const RunPlan plan = plan_run(run, full_size(), world, std::nullopt);
    EXPECT_NEAR(plan.teacher_flops / (64 * forward), 1, 1e-12) << world;
    EXPECT_EQ(plan.rounds, (32 + world - 1) / world);
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

// 60 experts on 64 ranks: four have none, are a kind of their own, and wait for the others.
TEST(Plan, RanksWithoutExpertsAreAKind) {
  RunConfig run = full_size_run();
  run.parallel.ep = 64;
  run.train.global_batch = 128;
  const RunPlan plan = plan_run(run, full_size(), 64, h100());
  ASSERT_EQ(plan.ranks.size(), 2u);
  std::map<std::int64_t, int> alike;
  std::map<std::int64_t, double> seconds;
  for (const PlannedRank& r : plan.ranks) {
    alike[r.experts] += r.alike;
    seconds[r.experts] = r.step.seconds();
  }
  EXPECT_EQ(alike, (std::map<std::int64_t, int>{{0, 4}, {1, 60}}));
  EXPECT_EQ(plan.ranks_without_experts, 4);
  EXPECT_LT(seconds[0], seconds[1]);
  EXPECT_NEAR(plan.time->imbalance, (seconds[1] - seconds[0]) * 4 / 64, 1e-9);
  run.parallel.ep = 32;
  EXPECT_EQ(plan_run(run, full_size(), 64, h100()).ranks_without_experts, 0);
}

// Five micro-batches of four replicas: one rank has two of them, and three wait while it computes the second.
TEST(Plan, RanksWithFewerMicroBatchesAreAKind) {
  RunConfig run = full_size_run();
  run.train.micro_batch = 1;
  run.train.global_batch = 5;
  const RunPlan plan = plan_run(run, full_size(), 4, h100());
  ASSERT_EQ(plan.ranks.size(), 2u);
  EXPECT_EQ(plan.ranks[1].alike, 3);
  double flops = 0;
  for (const PlannedRank& r : plan.ranks)
    for (const auto& [op, cost] : r.costs) flops += r.alike * cost.model_flops;
  EXPECT_NEAR(flops / plan.model_flops, 1, 1e-9);
  const double idle = plan.ranks[0].step.seconds() - plan.ranks[1].step.seconds();
  EXPECT_GT(idle, 0.3 * plan.time->seconds);
  EXPECT_NEAR(plan.time->imbalance, idle * 3 / 4, 1e-9);
  run.train.global_batch = 8;
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
  std::set<std::string> meshes;
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
    EXPECT_DOUBLE_EQ(plan.time->mfu, f.mfu);
    EXPECT_EQ(f.parallel.pp_chunks, LayoutSearch::kChunks);
    EXPECT_EQ(f.parallel.node_ranks, LayoutSearch::kNodeRanks);
    meshes.insert(plan.mesh.str());
  }
  // Each mesh is counted once: as left out, as planned once, or as one whose layouts were compared.
  const LayoutSearch::Excluded& x = found.excluded;
  const std::int64_t planned = found.meshes - x.impossible - x.across_nodes - x.short_context -
                               x.cut_experts - x.idle_ranks - x.not_reached,
                     compared = planned - x.too_large - x.slower;
  EXPECT_GE(compared, static_cast<std::int64_t>(meshes.size()));
  EXPECT_LE(compared, 8);
  EXPECT_GE(found.plans, planned + static_cast<std::int64_t>(found.best.size()));
  EXPECT_EQ(found.device_bytes, plan_run(run, full_size(), 8, h100()).device_bytes);
}

// Ranks without experts are looked at where nothing else fits, and else counted apart.
TEST(LayoutSearch, WastesNoRankWithoutNeed) {
  ModelConfig model = full_size();
  model.num_experts = 3;
  model.num_experts_per_tok = 2;
  RunConfig run = full_size_run();
  Machine machine = h100();
  const LayoutSearch found = search_layouts(run, model, 4, machine);
  ASSERT_FALSE(found.best.empty());
  for (const FoundLayout& f : found.best) EXPECT_LE(f.parallel.ep, 3);
  EXPECT_GT(found.excluded.idle_ranks, 0);
  machine.memory_gb = machine.usable_gb = 1;
  const LayoutSearch none = search_layouts(run, model, 4, machine);
  EXPECT_TRUE(none.best.empty());
  EXPECT_EQ(none.excluded.idle_ranks, 0);
  EXPECT_GE(none.excluded.too_large, found.excluded.idle_ranks);
}

// Nor is a key named that leaves ranks idle, where another makes the run fit.
TEST(Plan, ChangesWasteNoRankWithoutNeed) {
  RunConfig run = full_size_run();
  run.parallel.ep = 32;
  run.train.global_batch = 1024;
  run.train.micro_batch = 16;
  Machine machine = h100();
  const auto ep_of_all = [](const std::vector<Change>& changes) {
    return std::any_of(changes.begin(), changes.end(),
                       [](const Change& c) { return c.keys == "parallel.ep=64"; });
  };
  const RunPlan large = plan_run(run, full_size(), 64, machine);
  ASSERT_FALSE(large.fits());
  const std::vector<Change> smaller = helpful_changes(run, full_size(), large, machine);
  ASSERT_TRUE(!smaller.empty() && smaller.front().fits);
  EXPECT_FALSE(ep_of_all(smaller));
  run.train.micro_batch = 1;
  machine.memory_gb = machine.usable_gb = 5;
  const RunPlan hopeless = plan_run(run, full_size(), 64, machine);
  ASSERT_FALSE(hopeless.fits());
  EXPECT_TRUE(ep_of_all(helpful_changes(run, full_size(), hopeless, machine)));
}

// A run's own values of what the search decides change nothing.
TEST(LayoutSearch, SetsChunksNodesAndZeroItself) {
  RunConfig run = full_size_run();
  run.train.global_batch = 16;
  const LayoutSearch found = search_layouts(run, full_size(), 4, h100());
  run.parallel.pp_chunks = 3;
  run.parallel.node_ranks = 2;
  run.parallel.zero = 2;
  const LayoutSearch other = search_layouts(run, full_size(), 4, h100());
  ASSERT_EQ(found.best.size(), other.best.size());
  for (std::size_t i = 0; i < found.best.size(); ++i)
    EXPECT_EQ(found.best[i].seconds, other.best[i].seconds) << i;
}

TEST(LayoutSearch, NothingFitsOnTooFew) {
  const LayoutSearch found = search_layouts(full_size_run(), full_size(), 1, h100());
  EXPECT_TRUE(found.best.empty());
  EXPECT_EQ(found.meshes, 1);
  EXPECT_EQ(found.excluded.too_large, 1);
  EXPECT_EQ(found.plans, 2) << "as it stands, and as small as it gets";
  EXPECT_GT(found.least_bytes, found.device_bytes);
  EXPECT_GT(found.device_bytes, 0);
  EXPECT_EQ(found.savings, std::vector<std::string>{"optimizer.name=adamw8bit"});
}

TEST(LayoutSearch, NamesWhatTakesLess) {
  RunConfig run = full_size_run();
  run.optimizer.name = OptimizerKind::kAdamW8bit;
  run.parallel.reduce = Precision::kFp32;
  EXPECT_EQ(search_layouts(run, full_size(), 1, h100()).savings,
            std::vector<std::string>{"parallel.reduce=bf16"});
}

}  // namespace
}  // namespace upmoe::test
