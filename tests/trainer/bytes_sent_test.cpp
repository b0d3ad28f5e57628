// What the ranks of a real run send in a step is what a rehearsal of each of them on the dry device foretells,
// to the byte and verb by verb; and it is what the run writes down.

#include "parallel/dry_comm.h"
#include "parallel/thread_comm.h"
#include "tests/support/layout_run.h"
#include "tests/trainer/whole_run.h"

namespace upmoe::test {
namespace {

constexpr std::int64_t kSteps = 2;

// By verb, of one step.
using Sent = std::map<std::string, Cost>;

Sent sent_of(const Ledger& ledger) {
  Sent sent;
  for (const char* verb :
       {"all_reduce", "broadcast", "reduce_scatter", "all_gather", "all_to_all_rows", "send"})
    if (const auto it = ledger.entries().find(verb); it != ledger.entries().end()) sent[verb] = it->second;
  return sent;
}

// Every token asks for every expert: then nobody needs to compute to know where rows go.
ModelConfig config_of(const Golden& golden) {
  ModelConfig config = golden.config();
  config.num_experts_per_tok = config.num_experts;
  return config;
}

std::vector<Sent> steps_of(const Golden& golden, const RunConfig& run, Communicator& world, Device device) {
  Session s(run, config_of(golden), world, device);
  if (device.type == DeviceType::kCpu) s.params.load(s.memory.exec, golden_weights(golden));
  s.optimizer.reset(s.memory.exec);
  s.open_data(0);
  Trainer trainer(s);
  std::vector<Sent> steps;
  for (std::int64_t step = 1; step <= kSteps; ++step) {
    const StepReport report = trainer.step(step);
    steps.push_back(sent_of(s.memory.ledger));
    double sum = 0;
    for (const auto& [verb, cost] : steps.back()) sum += cost.bytes_sent;
    EXPECT_EQ(report.bytes_sent, sum);
  }
  trainer.settle();
  return steps;
}

class BytesSent : public testing::TestWithParam<Layout> {};

TEST_P(BytesSent, ARealRunSendsWhatTheDryWorldForetells) {
  const Layout& layout = GetParam();
  const Golden golden(layout.model);
  const int ranks = layout.mesh.world();
  const fs::path tokens = fs::path(testing::TempDir()) / fmt::format("bytes_sent_{}.h5", ::getpid());
  const RunConfig run = run_of(layout, golden, tokens);
  golden.write_tokens(tokens);
  std::vector<std::vector<Sent>> real(static_cast<std::size_t>(ranks));
  run_in_threads(ranks, [&](Communicator& world) {
    real[static_cast<std::size_t>(world.rank())] = steps_of(golden, run, world, {});
  });
  for (int rank = 0; rank < ranks; ++rank) {
    const auto world = make_dry_communicator(rank, ranks);
    const std::vector<Sent> dry = steps_of(golden, run, *world, {DeviceType::kDry, 0});
    for (std::size_t step = 0; step < dry.size(); ++step) {
      const Sent& sent = real[static_cast<std::size_t>(rank)][step];
      EXPECT_EQ(sent.size(), dry[step].size());
      for (const auto& [verb, cost] : dry[step]) {
        const auto it = sent.find(verb);
        ASSERT_NE(it, sent.end()) << verb << " of rank " << rank;
        EXPECT_EQ(it->second.calls, cost.calls) << verb << " of rank " << rank << ", step " << step + 1;
        // Between nodes the rehearsal takes a router that sends a token to as many experts of every node as it
        // has choices.
        if (layout.node_ranks > 0 && verb == "all_to_all_rows") continue;
        EXPECT_EQ(it->second.bytes_sent, cost.bytes_sent)
            << verb << " of rank " << rank << ", step " << step + 1;
      }
    }
  }
  fs::remove(tokens);
}

INSTANTIATE_TEST_SUITE_P(Layouts, BytesSent, testing::ValuesIn(layouts_of_every_kind()), [](const auto& i) {
  return i.param.str() + (i.param.zero == 2 ? "_zero2" : "") + (i.param.node_ranks > 0 ? "_nodes" : "") +
         (i.param.recompute != Recompute::kNone ? "_recomputed" : "");
});

class WholeRunSent : public WholeRun {
 protected:
  // Of rank 0, by step, as metrics.jsonl has it.
  std::vector<double> written(const std::string& name) const {
    std::vector<double> bytes;
    std::ifstream in(dir_ / name / "metrics.jsonl");
    for (std::string line; std::getline(in, line);) {
      const auto j = nlohmann::json::parse(line);
      if (j.contains("loss")) bytes.push_back(j.at("bytes_sent").get<double>());
    }
    return bytes;
  }
};

// Two ranks that share no experts: whatever the router does, they send gradients, weights and sums.
TEST_F(WholeRunSent, StandsInTheMetrics) {
  const RunConfig run = config("run", 3, 1);
  WholeRun::run(run, 2);
  const auto world = make_dry_communicator(0, 2);
  Session s(run, read_model_config(run.model.path), *world, {DeviceType::kDry, 0});
  s.open_data(0);
  Trainer trainer(s);
  std::vector<double> foretold;
  for (std::int64_t step = 1; step <= run.train.steps; ++step)
    foretold.push_back(trainer.step(step).bytes_sent);
  EXPECT_GT(foretold.front(), 0);
  EXPECT_EQ(written("run"), foretold);
}

TEST_F(WholeRunSent, OneRankSendsNothing) {
  WholeRun::run(config("run", 2, 1), 1);
  EXPECT_EQ(written("run"), std::vector<double>(2, 0.0));
}

}  // namespace
}  // namespace upmoe::test
