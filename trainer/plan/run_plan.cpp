#include "trainer/plan/run_plan.h"

#include <algorithm>
#include <map>
#include <tuple>
#include <utility>

#include "configs/expert_use.h"
#include "configs/nearest_meshes.h"
#include "configs/run_problems.h"
#include "trainer/batch_deal.h"
#include "trainer/checkpoint.h"
#include "trainer/rehearsal.h"
#include "trainer/stage_cost.h"

namespace upmoe {

namespace {

// What a rank holds of the parameters of its stage: the number of elements of each kind of parameter, and of experts.
struct Holding {
  std::vector<std::int64_t> elements;
  std::int64_t experts = 0;
};

// And of its teacher's.
void hold_teacher(Holding& holding, const RunConfig& run, int world, int rank) {
  const RunConfig::Train::Teacher& teacher = run.train.teacher;
  if (!teacher.given()) return;
  const MeshSpec mesh = mesh_of_teacher(run, world);
  for (const ParamSpec& p : make_param_table(*teacher.config))
    holding.elements.push_back(
        shard_of(p, mesh, rank, one_stage(teacher.config->num_hidden_layers)).elements());
}

Holding holding_of(const std::vector<ParamSpec>& table, const MeshSpec& mesh, int rank,
                   const StagePlan& plan) {
  Holding holding;
  for (const ParamSpec& p : table) {
    const Box box = shard_of(p, mesh, rank, plan);
    holding.elements.push_back(box.elements());
    if (p.expert && box.elements() > 0) holding.experts = box.extent.dim[0];
  }
  return holding;
}

MemoryPurposes purposes_of(const Rehearsal& rehearsal, double process) {
  const MemoryUse use = rehearsal.memory_use();
  MemoryPurposes m;
  m.weights = static_cast<double>(use.parameters);
  m.gradients = static_cast<double>(use.gradients);
  m.optimizer = static_cast<double>(use.optimizer);
  m.activations = static_cast<double>(use.activations);
  m.communication = static_cast<double>(use.buckets);
  m.workspace = static_cast<double>(use.scratch);
  m.teacher = static_cast<double>(use.teacher);
  m.process = process;
  return m;
}

// One rank's rehearsals, and what a whole step is made of.
class RankRehearsal {
 public:
  RankRehearsal(const RunConfig& run, const ModelConfig& model, int world, const RankSpeed* speed)
      : run_(run), model_(model), world_(world), speed_(speed), mesh_(mesh_of(run, world)) {}

  std::int64_t rounds() const { return deal_of(mesh_, 0, run_.train.micro_batches()).rounds(); }

  PlannedRank of(const RankKind& kind) const {
    StepClock clock(speed_, speed_ != nullptr ? speed_->ranks_per_node() : world_);
    Rehearsal rehearsal(run_, model_, kind.rank, world_, &clock);
    rehearsal.listen([&](const ToldOp& told) { clock.op(told); });
    const std::int64_t total = deal_of(mesh_, kind.rank, run_.train.micro_batches()).own(),
                       first = std::min(total, rounds_until_full(run_.parallel));
    rehearsal.step(first);  // after which updated weights are under way
    clock.take();
    PlannedRank rank;
    rank.rank = kind.rank;
    rank.alike = kind.alike;
    rank.stage = mesh_.coord(kind.rank, Axis::kPp);
    rank.costs = rehearsal.step(first).entries();
    rank.step = clock.take();
    rank.memory = purposes_of(rehearsal, speed_ != nullptr ? speed_->overhead_bytes() : 0);
    if (run_.checkpoint.async)
      rank.memory.checkpoint = static_cast<double>(CheckpointWriter::bytes_of(rehearsal.session()));
    if (total > first || mesh_.pp > 1) add_micro_batches(rehearsal, clock, rank, first, total);
    return rank;
  }

 private:
  // Interleaved chunks take micro-batches in groups of the stages.
  void add_micro_batches(Rehearsal& rehearsal, StepClock& clock, PlannedRank& rank, std::int64_t first,
                         std::int64_t total) const {
    const std::int64_t group = run_.parallel.pp_chunks > 1 ? mesh_.pp : 1;
    const double each = 1.0 / static_cast<double>(group), more = static_cast<double>(total - first);
    const auto longer = rehearsal.step(first + group).entries();
    StepTime difference = clock.take();
    difference.add(rank.step, -1);
    rank.micro_batch.add(difference, each);
    rank.step.add(rank.micro_batch, more);
    const auto shorter = rank.costs;
    for (const auto& [name, cost] : longer) {
      rank.costs[name].add(cost, more * each);
      if (const auto it = shorter.find(name); it != shorter.end())
        rank.costs[name].add(it->second, -more * each);
    }
  }

  const RunConfig& run_;
  const ModelConfig& model_;
  int world_;
  const RankSpeed* speed_;
  MeshSpec mesh_;
};

double waited(const StepTime& time, std::initializer_list<const char*> verbs) {
  double sum = 0;
  for (const char* verb : verbs)
    if (const auto it = time.waited.find(verb); it != time.waited.end()) sum += it->second;
  return sum;
}

// Whatever the mesh and the micro-batch: what one rank books for the smallest one. Ranks of a kind may have fewer
// micro-batches than the one that stands for them.
StepFlops step_flops_of(RunConfig run, const ModelConfig& model) {
  const std::int64_t sequences = least_sequences(model);
  const auto micro_batches = static_cast<double>(run.train.global_batch / sequences);
  run.train.global_batch = run.train.micro_batch = sequences;
  run.parallel = {.reduce = run.parallel.reduce};
  Rehearsal rehearsal(run, model, 0, 1);
  const Cost cost = rehearsal.step().total();
  return {micro_batches * cost.model_flops, micro_batches * cost.teacher_flops};
}

// The slowest rank of each stage, one micro-batch after the other: while the pipeline fills and drains, the slowest
// stage waits for one forward and one backward of each of the others.
double bubble_of(const RunPlan& plan, const PlannedRank& slowest, int chunks) {
  std::map<int, double> by_stage;
  for (const PlannedRank& r : plan.ranks) {
    double& seconds = by_stage[r.stage];
    seconds = std::max(seconds, r.micro_batch.seconds());
  }
  double bubble = 0;
  for (const auto& [stage, seconds] : by_stage)
    if (stage != slowest.stage) bubble += seconds / chunks;
  return bubble;
}

PlannedTime time_of(const RunPlan& plan, const RankSpeed& speed, int chunks) {
  PlannedTime time;
  double sum = 0;
  for (const PlannedRank& r : plan.ranks) sum += r.alike * r.step.seconds();
  const PlannedRank& slowest = plan.slowest();
  time.compute = slowest.step.compute;
  time.calls = slowest.step.calls;
  time.exchange = waited(slowest.step, {"all_to_all_rows"});
  time.stages = waited(slowest.step, {"send", "recv"});
  time.reduction = slowest.step.seconds() - time.compute - time.exchange - time.stages;
  time.bubble = bubble_of(plan, slowest, chunks);
  time.imbalance = slowest.step.seconds() - sum / plan.world;
  time.seconds = slowest.step.seconds() + time.bubble;
  time.tokens_per_s = plan.tokens / time.seconds;
  time.model_flops_per_s = plan.model_flops / plan.world / time.seconds;
  time.mfu = time.model_flops_per_s / speed.peak_flops_per_s();
  return time;
}

}  // namespace

std::string PlannedTime::limit() const {
  const std::pair<double, const char*> parts[] = {{calls, "calls"},
                                                  {exchange, "exchange"},
                                                  {reduction, "reduction"},
                                                  {bubble + stages, "bubble"},
                                                  {imbalance, "imbalance"}};
  const auto* most = std::max_element(std::begin(parts), std::end(parts),
                                      [](const auto& a, const auto& b) { return a.first < b.first; });
  return most->first > compute - calls - imbalance ? most->second : "compute";
}

const PlannedRank& RunPlan::fullest() const {
  return *std::max_element(ranks.begin(), ranks.end(), [&](const PlannedRank& a, const PlannedRank& b) {
    return bytes_of(a) < bytes_of(b);
  });
}

const PlannedRank& RunPlan::slowest() const {
  return *std::max_element(ranks.begin(), ranks.end(), [](const PlannedRank& a, const PlannedRank& b) {
    return a.step.seconds() < b.step.seconds();
  });
}

MemoryPurposes RunPlan::mean_memory() const {
  MemoryPurposes mean;
  for (const PlannedRank& r : ranks)
    for (const auto& [name, bytes] : MemoryPurposes::kAll)
      mean.*bytes += static_cast<double>(r.alike) / world * r.memory.*bytes;
  return mean;
}

std::vector<RankKind> kinds_of_ranks(const RunConfig& run, const ModelConfig& model, int world) {
  const MeshSpec mesh = mesh_of(run, world);
  const StagePlan plan = stages_of(run, model);
  const std::vector<ParamSpec> table = make_param_table(model);
  // Only these coordinates decide what a rank holds, and its place among the replicas how many micro-batches it has.
  std::map<std::tuple<int, std::int64_t, int, int, int>, RankKind> places;
  for (int rank = 0; rank < world; ++rank) {
    RankKind& place =
        places[{mesh.coord(rank, Axis::kPp), deal_of(mesh, rank, run.train.micro_batches()).own(),
                mesh.coord(rank, Axis::kTp), mesh.coord(rank, Axis::kEp), mesh.coord(rank, Axis::kEtp)}];
    if (place.alike == 0) place.rank = rank;
    ++place.alike;
  }
  std::map<std::tuple<int, std::int64_t, std::vector<std::int64_t>>, RankKind> kinds;
  for (const auto& [where, place] : places) {
    Holding holding = holding_of(table, mesh, place.rank, plan);
    hold_teacher(holding, run, world, place.rank);
    RankKind& kind = kinds[{std::get<0>(where), std::get<1>(where), holding.elements}];
    if (kind.alike == 0 || mesh.coord(place.rank, Axis::kDp) < mesh.coord(kind.rank, Axis::kDp))
      kind.rank = place.rank;
    kind.alike += place.alike;
  }
  std::vector<RankKind> all;
  for (const auto& [holding, kind] : kinds) all.push_back(kind);
  std::sort(all.begin(), all.end(), [](const RankKind& a, const RankKind& b) { return a.rank < b.rank; });
  return all;
}

RunPlan plan_run(const RunConfig& run, const ModelConfig& model, int world,
                 const std::optional<Machine>& machine, const PlanScope& scope) {
  require_possible(run, model, world);
  std::optional<RankSpeed> speed;
  if (machine) speed.emplace(*machine, run.train.precision, world);
  const RankRehearsal rehearsal(run, model, world, speed ? &*speed : nullptr);
  RunPlan plan;
  plan.world = world;
  plan.mesh = mesh_of(run, world);
  plan.ranks_without_experts = ranks_without_experts(run.parallel, model);
  plan.rounds = rehearsal.rounds();
  plan.tokens = static_cast<double>(run.train.global_batch) * static_cast<double>(run.data.seq_len);
  if (speed) {
    plan.device_bytes = speed->memory_bytes();
    plan.on_host = machine->shared_by_ranks;
  }
  const StagePlan stages = stages_of(run, model);
  const std::vector<ParamSpec> table = make_param_table(model);
  for (const RankKind& kind : kinds_of_ranks(run, model, world)) {
    if (!scope.ranks.empty() && !scope.ranks.contains(kind.rank)) continue;
    PlannedRank rank = rehearsal.of(kind);
    rank.experts = holding_of(table, plan.mesh, kind.rank, stages).experts;
    plan.ranks.push_back(std::move(rank));
  }
  UPMOE_CHECK(!plan.ranks.empty(), "none of the ranks asked for stands for a kind");
  const StepFlops flops = scope.flops ? *scope.flops : step_flops_of(run, model);
  plan.model_flops = flops.model;
  plan.teacher_flops = flops.teacher;
  if (speed) plan.time = time_of(plan, *speed, run.parallel.pp_chunks);
  return plan;
}

}  // namespace upmoe
