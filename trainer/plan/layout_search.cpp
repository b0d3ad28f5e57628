#include "trainer/plan/layout_search.h"

#include <fmt/format.h>

#include <algorithm>
#include <optional>

#include "configs/expert_use.h"
#include "configs/nearest_meshes.h"
#include "configs/run_problems.h"

namespace upmoe {

namespace {

constexpr std::size_t kShown = 10, kRefined = 8;
constexpr std::int64_t kLeastContext = 8192;  // tokens of a rank, below which cp is not tried
// What plans may go through together, in the unit of weight_of().
constexpr double kFirstWeight = 300, kSecondWeight = 300;

// How long a plan of it takes: a rehearsal of each stage, in which gradients are packed for every replica.
double weight_of(const RunConfig& run, int world) {
  return run.parallel.pp + static_cast<double>(run.parallel.replicas(world)) / 16;
}

// How much is cut up that need not be.
int cuts_of(const RunConfig::Parallel& p) {
  return p.tp * p.pp * p.cp * p.etp;
}

class Search {
 public:
  Search(const RunConfig& run, const ModelConfig& model, int world, const Machine& machine)
      : run_(run), model_(model), world_(world), machine_(machine) {}

  LayoutSearch find() {
    note_savings();
    const std::vector<RunConfig> meshes = possible_meshes();
    Fitting fitting = that_fit(meshes);
    // A rank without experts is a waste, which only want of memory excuses.
    if (fitting.empty() && !idle_.empty()) {
      found_.excluded.idle_ranks = 0;
      fitting = that_fit(idle_);
    }
    std::stable_sort(fitting.begin(), fitting.end(),
                     [](const auto& a, const auto& b) { return a.first.seconds < b.first.seconds; });
    double left = kSecondWeight;
    std::size_t refined = 0;
    for (; refined < std::min(kRefined, fitting.size()) && left > 0; ++refined)
      refine(fitting[refined].second, left);
    found_.excluded.slower = static_cast<std::int64_t>(fitting.size() - refined);
    // Its turn may have ended among policies that do not fit.
    if (found_.best.empty() && !fitting.empty()) found_.best.push_back(fitting.front().first);
    keep_best();
    return found_;
  }

 private:
  using Fitting = std::vector<std::pair<FoundLayout, RunConfig>>;

  // Of the meshes, those that fit, as they were looked at first.
  Fitting that_fit(std::vector<RunConfig> meshes) {
    std::stable_sort(meshes.begin(), meshes.end(), [](const RunConfig& a, const RunConfig& b) {
      return cuts_of(a.parallel) < cuts_of(b.parallel);
    });
    Fitting fitting;
    // Those that are cut up alike may take half of what is left, so that each kind has its turn.
    double left = kFirstWeight, share = left / 2;
    int cuts = 0;
    for (const RunConfig& mesh : meshes) {
      const bool first = cuts_of(mesh.parallel) != cuts;
      if (first) share = left / 2;
      cuts = cuts_of(mesh.parallel);
      const double weight = 2 * weight_of(mesh, world_);
      if (weight > (first ? left : share)) {
        ++found_.excluded.not_reached;
        continue;
      }
      left -= weight;
      share -= weight;
      if (const std::optional<FoundLayout> found = first_look(mesh)) {
        fitting.emplace_back(*found, mesh);
      } else {
        ++found_.excluded.too_large;
      }
    }
    return fitting;
  }

  // The run's own micro-batch, or the largest smaller one with which every replica gets one.
  std::int64_t micro_batch_for(const RunConfig& run, std::int64_t most) const {
    const std::int64_t replicas = run.parallel.replicas(world_), global = run.train.global_batch,
                       least = least_sequences(model_);
    for (std::int64_t size = std::min(std::max(most, least), global); size >= least; --size)
      if (size % least == 0 && global % size == 0 && global / size >= replicas) return size;
    return 0;
  }

  std::vector<RunConfig> possible_meshes() {
    std::vector<RunConfig> all;
    const auto any = [](int n, auto) {
      const std::vector<std::int64_t> found = divisors(n, n);
      return std::vector<int>(found.begin(), found.end());
    };
    for_each_mesh(world_, any, [&](const RunConfig::Parallel& axes) {
      RunConfig run = run_;
      run.parallel.pp = axes.pp, run.parallel.cp = axes.cp, run.parallel.tp = axes.tp;
      run.parallel.ep = axes.ep, run.parallel.etp = axes.etp;
      run.parallel.zero = LayoutSearch::kZero.front();
      run.parallel.pp_chunks = LayoutSearch::kChunks;
      run.parallel.node_ranks = LayoutSearch::kNodeRanks;
      if (is_worth_it(run)) all.push_back(run);
    });
    return all;
  }

  bool is_worth_it(RunConfig& run) {
    ++found_.meshes;
    const RunConfig::Parallel& p = run.parallel;
    LayoutSearch::Excluded& out = found_.excluded;
    run.train.micro_batch = micro_batch_for(run, run_.train.micro_batch);
    if (run.train.micro_batch == 0 || !problems_of(run, model_, world_).empty())
      return ++out.impossible, false;
    if (p.tp > machine_.ranks_per_node) return ++out.across_nodes, false;
    if (p.cp > 1 && run.data.seq_len / p.cp < kLeastContext) return ++out.short_context, false;
    if (p.etp > 1 && 2 * p.ep <= model_.num_experts) return ++out.cut_experts, false;
    if (ranks_without_experts(p, model_) > 0) return ++out.idle_ranks, idle_.push_back(run), false;
    return true;
  }

  std::optional<FoundLayout> planned(const RunConfig& run) {
    ++found_.plans;
    const RunPlan plan = plan_run(run, model_, world_, machine_, {.ranks = {}, .flops = flops_});
    flops_ = {plan.model_flops, plan.teacher_flops};  // those of every layout
    found_.device_bytes = plan.device_bytes;
    if (!plan.fits()) {
      const double bytes = plan.bytes_of(plan.fullest());
      found_.least_bytes = found_.least_bytes > 0 ? std::min(found_.least_bytes, bytes) : bytes;
      return std::nullopt;
    }
    return FoundLayout{run.parallel,
                       run.train.micro_batch,
                       run.train.recompute,
                       plan.time->seconds,
                       plan.time->tokens_per_s,
                       plan.time->mfu,
                       plan.bytes_of(plan.fullest()),
                       plan.ranks_without_experts};
  }

  // As it stands, or else as small as it gets. Nothing: it does not fit.
  std::optional<FoundLayout> first_look(RunConfig run) {
    if (const auto found = planned(run)) return found;
    run.train.recompute = Recompute::kBlock;
    run.train.micro_batch = micro_batch_for(run, 1);
    run.parallel.zero =
        run.parallel.replicas(world_) > 1 ? LayoutSearch::kZero.back() : LayoutSearch::kZero.front();
    if (!problems_of(run, model_, world_).empty()) return std::nullopt;
    return planned(run);
  }

  // Every micro-batch and ZeRO stage, each with the first policy that fits as long as something
  // is `left` of what plans may weigh.
  void refine(RunConfig run, double& left) {
    const std::int64_t most = micro_batch_for(run, 16);
    for (const int zero : LayoutSearch::kZero) {
      if (zero > 1 && run.parallel.replicas(world_) == 1) continue;
      run.parallel.zero = zero;
      for (std::int64_t size = 1; size <= most; size *= 2) {
        run.train.micro_batch = size;
        if (!problems_of(run, model_, world_).empty()) continue;
        bool fits = false;
        for (const auto& policy : kNames<Recompute>.built) {
          run.train.recompute = policy.value;
          if (left <= 0) return;
          left -= weight_of(run, world_);
          const auto found = planned(run);
          if (!found) continue;
          fits = true;
          found_.best.push_back(*found);
          break;
        }
        if (!fits) break;  // larger ones will not either
      }
    }
  }

  void note_savings() {
    if (run_.optimizer.name != OptimizerKind::kAdamW8bit)
      found_.savings.push_back(fmt::format("optimizer.name={}", name_of(OptimizerKind::kAdamW8bit)));
    if (run_.train.precision != Precision::kBf16)
      found_.savings.push_back(fmt::format("train.precision={}", name_of(Precision::kBf16)));
    else if (run_.parallel.reduce != Precision::kBf16)
      found_.savings.push_back(fmt::format("parallel.reduce={}", name_of(Precision::kBf16)));
  }

  void keep_best() {
    std::stable_sort(found_.best.begin(), found_.best.end(),
                     [](const FoundLayout& a, const FoundLayout& b) { return a.seconds < b.seconds; });
    if (found_.best.size() > kShown) found_.best.resize(kShown);
  }

  const RunConfig& run_;
  const ModelConfig& model_;
  int world_;
  const Machine& machine_;
  std::vector<RunConfig> idle_;     // meshes in which ranks have no experts
  std::optional<StepFlops> flops_;  // none: no layout was planned yet
  LayoutSearch found_;
};

}  // namespace

LayoutSearch search_layouts(const RunConfig& run, const ModelConfig& model, int world,
                            const Machine& machine) {
  return Search(run, model, world, machine).find();
}

}  // namespace upmoe
