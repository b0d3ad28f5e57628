#include "trainer/plan/changes.h"

#include <fmt/format.h>

#include <algorithm>

#include "configs/run_problems.h"

namespace upmoe {

namespace {

constexpr double kWorthSaying = 0.02;  // of a step's time, or of a rank's memory

struct Candidate {
  std::string keys;
  RunConfig run;
};

class Candidates {
 public:
  explicit Candidates(const RunConfig& run) : run_(run) {}

  void recompute(int step) {
    const auto& names = kNames<Recompute>.built;  // by how much is computed again, the least first
    const int next = static_cast<int>(run_.train.recompute) + step;
    if (next < 0 || next >= static_cast<int>(names.size())) return;
    RunConfig& r = add("train.recompute", (names.begin() + next)->name);
    r.train.recompute = (names.begin() + next)->value;
  }
  void micro_batch(std::int64_t size) {
    if (size < 1 || size == run_.train.micro_batch || run_.train.global_batch % size != 0) return;
    add("train.micro_batch", std::to_string(size)).train.micro_batch = size;
  }
  void optimizer() {
    if (run_.optimizer.name == OptimizerKind::kAdamW8bit) return;
    add("optimizer.name", "adamw8bit").optimizer.name = OptimizerKind::kAdamW8bit;
  }
  void reduce() {
    if (run_.train.precision != Precision::kBf16 || run_.parallel.reduce == Precision::kBf16) return;
    add("parallel.reduce", "bf16").parallel.reduce = Precision::kBf16;
  }
  void zero(int stage) {
    if (run_.parallel.zero != stage) add("parallel.zero", std::to_string(stage)).parallel.zero = stage;
  }
  void node_ranks(int ranks) {
    if (run_.parallel.node_ranks != 0 || run_.parallel.ep <= ranks || ranks < 2) return;
    add("parallel.node_ranks", std::to_string(ranks)).parallel.node_ranks = ranks;
  }
  void chunks() {
    if (run_.parallel.pp > 1 && run_.parallel.pp_chunks == 1)
      add("parallel.pp_chunks", "2").parallel.pp_chunks = 2;
  }
  // Experts over twice as many ranks.
  void experts() { add("parallel.ep", std::to_string(2 * run_.parallel.ep)).parallel.ep *= 2; }
  const std::vector<Candidate>& all() const { return all_; }

 private:
  RunConfig& add(const char* key, const std::string& value) {
    all_.push_back({fmt::format("{}={}", key, value), run_});
    return all_.back().run;
  }
  const RunConfig& run_;
  std::vector<Candidate> all_;
};

std::vector<Candidate> candidates_of(const RunConfig& run, const RunPlan& plan, const Machine& machine) {
  Candidates c(run);
  if (!plan.fits()) {
    for (const int steps : {1, 2, 3}) c.recompute(steps);
    c.micro_batch(run.train.micro_batch / 2);
    c.optimizer();
    c.reduce();
    c.zero(2);
    c.experts();
  } else {
    for (const int steps : {1, 2}) c.recompute(-steps);
    c.micro_batch(run.train.micro_batch * 2);
    c.micro_batch(run.train.micro_batch / 2);
    c.zero(1);
    c.node_ranks(machine.ranks_per_node);
    c.chunks();
    c.reduce();
  }
  return c.all();
}

}  // namespace

std::vector<Change> helpful_changes(const RunConfig& run, const ModelConfig& model, const RunPlan& plan,
                                    const Machine& machine) {
  std::vector<Change> helpful;
  const double bytes = plan.bytes_of(plan.fullest()), seconds = plan.time->seconds;
  for (const Candidate& candidate : candidates_of(run, plan, machine)) {
    if (!problems_of(candidate.run, model, plan.world).empty()) continue;
    // The ranks that decide, where the same ones do: experts and stages are held as before.
    PlanScope scope{.ranks = {plan.fullest().rank, plan.slowest().rank},
                    .flops = StepFlops{plan.model_flops, plan.teacher_flops}};
    if (plan.mesh.pp > 1 || candidate.run.parallel.ep != run.parallel.ep) scope.ranks.clear();
    const RunPlan other = plan_run(candidate.run, model, plan.world, machine, scope);
    const Change change{candidate.keys, other.bytes_of(other.fullest()), other.time->seconds, other.fits(),
                        other.ranks_without_experts};
    const bool smaller = change.bytes < bytes * (1 - kWorthSaying),
               faster = change.fits && change.seconds < seconds * (1 - kWorthSaying);
    if (plan.fits() ? faster : smaller) helpful.push_back(change);
  }
  std::sort(helpful.begin(), helpful.end(), [](const Change& a, const Change& b) {
    if (a.fits != b.fits) return a.fits;
    return a.fits ? a.seconds < b.seconds : a.bytes < b.bytes;
  });
  const auto wastes = [&](const Change& c) { return c.ranks_without_experts > plan.ranks_without_experts; };
  if (std::any_of(helpful.begin(), helpful.end(), [&](const Change& c) { return c.fits && !wastes(c); }))
    std::erase_if(helpful, wastes);
  return helpful;
}

}  // namespace upmoe
