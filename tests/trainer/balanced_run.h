#pragma once
// Steps of a real run whose routers are balanced without luck, rank by rank, to hold rehearsals and plans against.

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "tests/support/layout_run.h"
#include "tests/support/temporary_directory.h"

namespace upmoe::test {

namespace fs = std::filesystem;

using Books = std::map<std::string, Cost, std::less<>>;  // of one step

// What one rank did and held.
struct RankSeen {
  std::vector<Books> steps;
  MemoryUse memory;
  std::size_t scratch_at_ops = 0;      // the most that layers held when an op began
  std::size_t reported = 0;            // tensors_peak of the last step
  std::vector<double> flops_per_rank;  // as the steps report it
};

struct BalancedRun {
  static constexpr std::int64_t kSteps = 2;

  RunConfig run;  // its token file is gone: nothing that is held against it may look for it
  ModelConfig config;
  std::vector<RankSeen> ranks;
};

// Every token asks for every expert, the one routing of tokens that needs no luck to be balanced; or experts ask.
inline ModelConfig balanced_config(const Layout& layout, const Golden& golden) {
  ModelConfig config = golden.config();
  if (layout.num_experts > 0) config.num_experts = layout.num_experts;
  config.router = layout.form.value_or(config.router);
  config.lora = layout.lora;
  if (!config.router.routes_groups()) config.num_experts_per_tok = config.num_experts;
  return config;
}

inline RankSeen run_balanced_rank(const ReadParam& weights, const RunConfig& run, const ModelConfig& config,
                                  Communicator& world) {
  Session s(run, config, world);
  s.params.load(s.memory.exec, weights);
  if (s.teacher != nullptr) s.teacher->load(s.memory.exec, drawn_weights());
  s.optimizer.reset(s.memory.exec);
  s.open_data(0);
  Trainer trainer(s);
  RankSeen seen;
  s.memory.ledger.listen(
      [&](const ToldOp&) { seen.scratch_at_ops = std::max(seen.scratch_at_ops, s.memory.scratch.used()); });
  for (std::int64_t step = 1; step <= BalancedRun::kSteps; ++step) {
    const StepReport report = trainer.step(step);
    EXPECT_FALSE(report.skipped);
    seen.steps.push_back(s.memory.ledger.entries());
    seen.flops_per_rank.push_back(report.flops_per_rank);
    seen.reported = report.tensors_peak;
    EXPECT_EQ(report.bytes_sent, s.memory.ledger.total().bytes_sent);
  }
  trainer.settle();
  s.memory.ledger.listen({});
  seen.memory = s.memory_use();
  return seen;
}

inline BalancedRun run_balanced(const Layout& layout) {
  const Golden golden(layout.model);
  const TemporaryDirectory folder;
  const fs::path tokens = folder.path() / "tokens.h5";
  BalancedRun done{run_of(layout, golden, tokens), balanced_config(layout, golden), {}};
  golden.write_tokens(tokens, make_loss_mask(layout.loss_mask, golden));
  done.ranks.resize(static_cast<std::size_t>(layout.mesh.world()));
  run_in_threads(layout.mesh.world(), [&](Communicator& world) {
    done.ranks[static_cast<std::size_t>(world.rank())] =
        run_balanced_rank(weights_of(layout, golden), done.run, done.config, world);
  });
  return done;
}

}  // namespace upmoe::test
