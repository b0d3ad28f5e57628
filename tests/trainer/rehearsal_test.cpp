// A rehearsal of any rank books what that rank of a real run books, entry by entry, and holds what it holds; and what
// it says of bytes sent is what the run writes down.

#include "trainer/rehearsal.h"

#include "tests/support/full_size.h"
#include "tests/support/taught.h"
#include "tests/trainer/balanced_run.h"
#include "tests/trainer/whole_run.h"
#include "trainer/memory_estimate.h"

namespace upmoe::test {
namespace {

// What the host's memory is to a run on the CPU, the dry device, like a GPU, is given: tokens, targets, positions and
// documents of this rank's part of each micro-batch, and the rows of groups.
Cost uploads_of_tokens(const RunConfig& run, bool grouped, const ProcessMesh& mesh) {
  const Deal deal{run.train.global_batch / run.train.micro_batch, mesh.coord(Axis::kDp), mesh.spec().dp};
  const double rows = 3.0 + (run.data.mask_documents ? 1 : 0) + (grouped ? 1 : 0),
               tokens = static_cast<double>(run.train.micro_batch * run.data.seq_len / mesh.spec().cp);
  Cost cost;
  for (std::int64_t round = 0; round < deal.rounds(); ++round) {
    cost.calls += static_cast<std::int64_t>(rows);
    if (deal.index(round) >= 0) cost.bytes_read += rows * tokens * sizeof(std::int32_t);
  }
  cost.bytes_written = cost.bytes_read;
  return cost;
}

void expect_same_books(const Books& real, const Books& dry, const std::string& where) {
  for (const auto& [name, cost] : real) EXPECT_TRUE(dry.contains(name)) << name << " of " << where;
  for (const auto& [name, cost] : dry) {
    const auto it = real.find(name);
    ASSERT_NE(it, real.end()) << name << " of " << where;
    EXPECT_EQ(it->second.calls, cost.calls) << name << " of " << where;
    EXPECT_EQ(it->second.flops, cost.flops) << name << " of " << where;
    EXPECT_EQ(it->second.bytes_read, cost.bytes_read) << name << " of " << where;
    EXPECT_EQ(it->second.bytes_written, cost.bytes_written) << name << " of " << where;
    EXPECT_EQ(it->second.bytes_sent, cost.bytes_sent) << name << " of " << where;
    EXPECT_EQ(it->second.model_flops, cost.model_flops) << name << " of " << where;
    EXPECT_EQ(it->second.attention_flops, cost.attention_flops) << name << " of " << where;
    EXPECT_EQ(it->second.model_again, cost.model_again) << name << " of " << where;
    EXPECT_EQ(it->second.teacher_flops, cost.teacher_flops) << name << " of " << where;
  }
}

// Of scratch memory the run takes more by what the backend of one op takes inside of it.
void expect_same_memory(const RankSeen& seen, const MemoryUse& dry, const std::string& where) {
  const MemoryUse& real = seen.memory;
  EXPECT_EQ(real.parameters, dry.parameters) << where;
  EXPECT_EQ(real.gradients, dry.gradients) << where;
  EXPECT_EQ(real.optimizer, dry.optimizer) << where;
  EXPECT_EQ(real.activations, dry.activations) << where;
  EXPECT_EQ(real.buckets, dry.buckets) << where;
  EXPECT_EQ(real.teacher, dry.teacher) << where;
  EXPECT_GE(real.scratch, dry.scratch) << where;
  EXPECT_EQ(seen.scratch_at_ops, dry.scratch) << where;
}

class Rehearsed : public testing::TestWithParam<Layout> {};

TEST_P(Rehearsed, IsWhatARealRunDoes) {
  const BalancedRun real = run_balanced(GetParam());
  const int ranks = static_cast<int>(real.ranks.size());
  std::vector<double> flops(BalancedRun::kSteps);
  for (int rank = 0; rank < ranks; ++rank) {
    const RankSeen& seen = real.ranks[static_cast<std::size_t>(rank)];
    Rehearsal rehearsal(real.run, real.config, rank, ranks);
    for (std::size_t step = 0; step < flops.size(); ++step) {
      const Ledger& ledger = rehearsal.step();
      flops[step] += ledger.total().model_flops;
      Books expected = seen.steps[step];
      expected["upload"] +=
          uploads_of_tokens(real.run, real.config.router.routes_groups(), rehearsal.session().mesh);
      expect_same_books(expected, ledger.entries(), fmt::format("rank {}, step {}", rank, step + 1));
    }
    expect_same_memory(seen, rehearsal.memory_use(), fmt::format("rank {}", rank));
  }
  for (std::size_t step = 0; step < flops.size(); ++step)
    EXPECT_DOUBLE_EQ(real.ranks.front().flops_per_rank[step], flops[step] / ranks);
}

// Besides: documents, everything narrow, a tied embedding at both ends of a pipeline, fewer micro-batches in the last
// round than ranks, targets that do not count, frozen parts, adapters, and teachers.
std::vector<Layout> layouts() {
  std::vector<Layout> all = layouts_of_every_kind();
  all.push_back({"moe_mixed", {1, 2, 1, 1, 2, 1}, 1});
  all.back().mask_documents = true;
  all.back().precision = all.back().reduce = Precision::kBf16;
  all.back().optimizer = OptimizerKind::kAdamW8bit;
  all.back().z_loss = 1e-3;
  all.push_back({"dense_tied_gqa", {2, 1, 1, 1, 1, 1}, 1});
  all.push_back({"dense", {1, 3, 1, 1, 1, 1}, 1});
  all.push_back({"moe_mixed", {1, 2, 1, 1, 2, 1}, 1});
  all.back().loss_mask = LossMask::kSome;
  for (const MeshSpec& mesh :
       {MeshSpec{1, 2, 1, 2, 2, 1}, MeshSpec{1, 3, 1, 1, 1, 1}, MeshSpec{1, 1, 2, 1, 2, 1}}) {
    all.push_back({"moe_a27b", mesh, 1});
    all.back().change = taught_by("dense", 0.5, 2);
  }
  for (const Recompute recompute : {Recompute::kNone, Recompute::kSwiglu}) {
    all.push_back({"moe_a27b", {1, 2, 1, 2, 2, 1}, 1});
    all.back().freeze = {"@experts", "@attention", "@shared"};
    all.back().recompute = recompute;
    all.push_back(all.back());
    all.back().freeze = {};
    all.back().lora = {3, 6, {LoraTarget::kQuery, LoraTarget::kValue, LoraTarget::kGate, LoraTarget::kDown}};
  }
  for (const Recompute recompute :
       {Recompute::kSwiglu, Recompute::kElementwise, Recompute::kRoutedUp, Recompute::kUp, Recompute::kFfn}) {
    all.push_back({"moe_a27b", {1, 2, 1, 2, 2, 1}, 1});
    all.back().recompute = recompute;
  }
  for (const auto& [kind, mesh] : {std::pair(RouterKind::kExpertChoice, MeshSpec{1, 2, 1, 1, 2, 1}),
                                   std::pair(RouterKind::kExpertChoice, MeshSpec{1, 1, 2, 1, 2, 1}),
                                   std::pair(RouterKind::kMixtureOfTokens, MeshSpec{1, 2, 1, 1, 2, 1}),
                                   std::pair(RouterKind::kMixtureOfTokens, MeshSpec{1, 1, 1, 2, 2, 1})}) {
    Layout l{"moe_mixed", mesh, 2};
    l.aux_loss = 0;
    l.with_form().kind = kind;
    l.with_form().group_size = 2;
    all.push_back(l);
  }
  // Ranks without experts; by way of nodes a whole node of them, the first.
  for (const auto& [mesh, node_ranks] :
       {std::pair(MeshSpec{1, 4, 1, 1, 4, 1}, 0), std::pair(MeshSpec{1, 4, 1, 1, 4, 1}, 1),
        std::pair(MeshSpec{1, 4, 1, 2, 8, 1}, 2)}) {
    all.push_back(of_three_experts(mesh));
    all.back().node_ranks = node_ranks;
  }
  all.push_back(of_three_experts({1, 4, 1, 1, 4, 1}));
  all.back().lora = {3, 6, {LoraTarget::kGate, LoraTarget::kUp, LoraTarget::kDown}};
  return all;
}

INSTANTIATE_TEST_SUITE_P(Layouts, Rehearsed, testing::ValuesIn(layouts()), [](const auto& i) {
  return i.param.str() + (i.param.zero == 2 ? "_zero2" : "") + (i.param.node_ranks > 0 ? "_nodes" : "") +
         (i.param.recompute != Recompute::kNone ? fmt::format("_{}", name_of(i.param.recompute)) : "") +
         (i.param.precision == Precision::kBf16 ? "_bf16" : "") +
         (i.param.loss_mask != LossMask::kNone ? "_masked" : "") + (i.param.freeze.empty() ? "" : "_frozen") +
         (i.param.lora.given() ? "_adapted" : "") + (i.param.change ? "_taught" : "") +
         (i.param.own_form().routes_groups() ? fmt::format("_{}", name_of(i.param.own_form().kind)) : "");
});

// Of full_size(), of which no rank's part would fit into this machine's memory.
RunConfig full_size_run() {
  RunConfig run;
  run.data.seq_len = 2048;
  run.train.global_batch = 16;
  run.train.micro_batch = 1;
  run.train.precision = Precision::kBf16;
  return run;
}

// A layout divides the products and attention of a step; it adds none.
TEST(Rehearsal, AMeshDividesTheModelsWork) {
  RunConfig run = full_size_run();
  const double alone = Rehearsal(run, full_size(), 0, 1).step().total().model_flops;
  EXPECT_GT(alone, 0);
  run.parallel = {.tp = 2, .pp = 2, .cp = 2, .ep = 4};
  double together = 0;
  std::set<std::size_t> parameters;
  for (int rank = 0; rank < 16; ++rank) {
    Rehearsal rehearsal(run, full_size(), rank, 16);
    together += rehearsal.step().total().model_flops;
    parameters.insert(rehearsal.memory_use().parameters);
  }
  EXPECT_NEAR(together / alone, 1.0, 1e-9);
  EXPECT_EQ(parameters.size(), 2u) << "two stages, of one embedding each";
}

TEST(Rehearsal, StepsAfterTheFirstAreAlike) {
  RunConfig run = full_size_run();
  run.parallel = {.ep = 4, .zero = 2};
  Rehearsal rehearsal(run, full_size(), 1, 4);
  const Books first = rehearsal.step().entries(), second = rehearsal.step().entries();
  expect_same_books(second, rehearsal.step().entries(), "step 3");
  EXPECT_GT(second.at("unpack_parts").calls, first.at("unpack_parts").calls)
      << "weights of the step before arrive";
}

// What ranks send each other of gradients and weights is packed and taken apart in one call for all of them.
TEST(Rehearsal, TheCallsOfAStepDoNotGrowWithTheRanks) {
  const auto step_of = [](RunConfig run, int ranks) {
    run.train.global_batch = 2 * run.train.micro_batch * ranks / (run.parallel.tp * run.parallel.pp);
    Rehearsal rehearsal(run, full_size(), ranks - 1, ranks);
    rehearsal.step();
    const Ledger& second = rehearsal.step();
    return std::pair(second.entries(), second.total().calls);
  };
  for (const RunConfig::Parallel& parallel :
       {RunConfig::Parallel{.ep = 8}, RunConfig::Parallel{.ep = 8, .zero = 2},
        RunConfig::Parallel{.tp = 2, .pp = 2, .ep = 4, .zero = 2}}) {
    RunConfig run = full_size_run();
    run.parallel = parallel;
    const auto [few, few_calls] = step_of(run, 8);
    const auto [some, some_calls] = step_of(run, 16);
    const auto [many, many_calls] = step_of(run, 512);
    const std::string where = fmt::format("tp {}, zero {}", parallel.tp, parallel.zero);
    EXPECT_GT(many.at("pack_parts").calls, 0) << where;
    for (const auto& [name, cost] : many) EXPECT_EQ(cost.calls, some.at(name).calls) << name << ", " << where;
    EXPECT_EQ(many_calls, some_calls) << where;
    EXPECT_LE(many_calls, 2 * few_calls) << where << ": on 8 ranks no other has the same experts";
  }
}

// A plan takes an op's rate from it.
TEST(Rehearsal, OpsSayWhatBoundsThem) {
  RunConfig run = full_size_run();
  run.train.micro_batch = 2;
  run.router.aux_loss = {0};
  ModelConfig model = full_size();
  model.num_hidden_layers = 1;
  std::map<std::string, Work> works;
  for (const RouterKind kind : {RouterKind::kTopK, RouterKind::kMixtureOfTokens}) {
    model.router.kind = kind;
    model.router.group_size = kind == RouterKind::kTopK ? 0 : 2;
    Rehearsal rehearsal(run, model, 0, 1);
    rehearsal.listen([&](const ToldOp& told) { works.emplace(told.name, told.work); });
    rehearsal.step();
  }
  EXPECT_EQ(works.at("gemm"), Work::kProduct);
  EXPECT_EQ(works.at("attention_forward"), Work::kAttention);
  EXPECT_EQ(works.at("attention_backward"), Work::kAttentionBackward);
  for (const char* op : {"grouped_gemm_forward", "grouped_gemm_dgrad", "grouped_gemm_wgrad", "mix_tokens",
                         "share_mixtures", "mixture_part_gradient"})
    EXPECT_EQ(works.at(op), Work::kGroupedProducts) << op;
  EXPECT_EQ(works.at("sigmoid_gate_backward"), Work::kRowSums);
  EXPECT_EQ(works.at("rms_norm_forward"), Work::kOther);
}

TEST(Rehearsal, RefusesAnImpossibleMesh) {
  RunConfig run = full_size_run();
  run.parallel.tp = 3;
  EXPECT_THROW(Rehearsal(run, full_size(), 0, 4), Error);
}

// The estimate rehearses a shorter step, in which everything is under way that ever is.
TEST(Rehearsal, AnEstimateIsTheMemoryOfALongStep) {
  RunConfig run = full_size_run();
  run.train.global_batch = 128;
  for (const auto& [parallel, ranks] : {std::pair{RunConfig::Parallel{.ep = 2}, 2},
                                        {RunConfig::Parallel{.pp = 4}, 4},
                                        {RunConfig::Parallel{.pp = 4, .pp_chunks = 2}, 4},
                                        {RunConfig::Parallel{.pp = 4, .pp_chunks = 3}, 4},
                                        {RunConfig::Parallel{.pp = 2, .cp = 2, .pp_chunks = 2}, 8}}) {
    run.parallel = parallel;
    for (int rank = 0; rank < ranks; ++rank) {
      Rehearsal rehearsal(run, full_size(), rank, ranks);
      rehearsal.step();
      EXPECT_EQ(estimate_memory(run, full_size(), rank, ranks).step, rehearsal.memory_use())
          << "rank " << rank << " of " << ranks << ", pp " << parallel.pp << ", chunks "
          << parallel.pp_chunks;
    }
  }
}

class WholeRunSent : public WholeRun {
 protected:
  // Of rank 0, by step, as metrics.jsonl has it.
  std::vector<double> written(const std::string& name, const char* key = "bytes_sent") const {
    std::vector<double> found;
    std::ifstream in(dir_ / name / "metrics.jsonl");
    for (std::string line; std::getline(in, line);) {
      const auto j = nlohmann::json::parse(line);
      if (j.contains("loss")) found.push_back(j.at(key).get<double>());
    }
    return found;
  }
};

// Two ranks that share no experts: whatever the router does, they send gradients, weights and sums.
TEST_F(WholeRunSent, StandsInTheMetrics) {
  const RunConfig run = config("run", 3, 1);
  WholeRun::run(run, 2);
  Rehearsal rehearsal(run, read_model_config(run.model.path), 0, 2);
  std::vector<double> foretold;
  for (std::int64_t step = 1; step <= run.train.steps; ++step)
    foretold.push_back(rehearsal.step().total().bytes_sent);
  EXPECT_GT(foretold.front(), 0);
  EXPECT_EQ(written("run"), foretold);
  const std::vector<double> seconds = written("run", "seconds"), waited = written("run", "seconds_waited");
  for (std::size_t i = 0; i < seconds.size(); ++i) {
    EXPECT_GT(waited[i], 0) << "step " << i + 1;
    EXPECT_LE(waited[i], seconds[i]) << "step " << i + 1;
  }
}

TEST_F(WholeRunSent, OneRankSendsNothing) {
  WholeRun::run(config("run", 2, 1), 1);
  EXPECT_EQ(written("run"), std::vector<double>(2, 0.0));
  EXPECT_EQ(written("run", "seconds_waited"), std::vector<double>(2, 0.0));
}

}  // namespace
}  // namespace upmoe::test
