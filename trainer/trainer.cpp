#include "trainer/trainer.h"

#include <chrono>
#include <cmath>
#include <numeric>
#include <optional>

#include "configs/expert_use.h"
#include "trainer/router_buffers.h"
#include "trainer/schedule.h"

namespace upmoe {

// Of the whole global batch, before its first micro-batch: what every gradient is divided by, wherever its token is.
std::int64_t Trainer::count_targets(std::int64_t number) {
  const RunConfig& run = s_.run;
  const std::int64_t all = run.tokens_per_step();
  const std::optional<std::int64_t> of_rank = s_.batches->counted_targets();
  if (!of_rank) return all;
  double sum = static_cast<double>(*of_rank);  // exact below 2^53
  s_.mesh.along(Axis::kDp).all_reduce(host_view(&sum, {1}), ReduceOp::kSum, s_.memory.exec);
  if (sum == 0)
    fail(ExitCode::kBadInput,
         "step {}: loss masks leave none of its {} targets, so there is nothing to learn from; use a larger "
         "train.global_batch, data.shuffle, or data with more that counts",
         number, all);
  return static_cast<std::int64_t>(sum);
}

StepSums Trainer::accumulate(std::int64_t number, std::int64_t targets) {
  Exec& ex = s_.memory.exec;
  const RunConfig& run = s_.run;
  const double micro_batches = static_cast<double>(run.train.micro_batches());
  Pipeline::Step step{.batches = *s_.batches};
  step.loss_scale = 1.0 / static_cast<double>(targets);
  for (std::size_t i = 0; i < run.router.aux_kind.size(); ++i)
    step.balance.terms.push_back({run.router.aux_kind[i], run.router.aux_loss.at(i) / micro_batches});
  step.balance.groups = run.router.aux_groups;
  if (step.balance.has(AuxKind::kGlobal)) step.balance.previous = router_loads(s_.params, s_.config);
  step.balance.z_coefficient = run.router.z_loss / micro_batches;
  if (s_.teacher != nullptr) {
    step.teacher = &s_.teacher->model();
    step.distillation = {run.train.teacher.weight, run.train.teacher.temperature};
  }
  step.seed = static_cast<std::uint64_t>(run.run.seed);
  step.first_token = static_cast<std::uint64_t>((number - 1) * run.tokens_per_step());
  step.before_block = [&](int block) { s_.reducer.await_values(ex, block); };
  step.block_done = [&](int block, bool last) { s_.reducer.ready(ex, block, last); };
  return s_.pipeline.run(ex, step);
}

// One small all-reduce for everything the ranks tell each other about a step.
void Trainer::reduce(const StepSums& sums, std::int64_t request, StepReport& report) {
  const Cost cost = s_.memory.ledger.total();
  std::vector<double> values{sums.loss,
                             sums.z,
                             cost.model_flops,
                             cost.model_flops + cost.model_again + cost.teacher_flops,
                             static_cast<double>(request),
                             sums.lost};
  values.insert(values.end(), sums.aux.begin(), sums.aux.end());
  const std::size_t head = values.size();
  for (const auto& layer : sums.assigned) values.insert(values.end(), layer.begin(), layer.end());
  if (s_.teacher != nullptr) values.insert(values.end(), {sums.divergence, cost.teacher_flops});
  s_.mesh.world().all_reduce(host_view(values.data(), {static_cast<std::int64_t>(values.size())}),
                             ReduceOp::kSum, s_.memory.exec);

  const double micro_batches = static_cast<double>(s_.run.train.micro_batches());
  report.loss = values[0] / static_cast<double>(report.targets);
  report.z_loss = values[1] / micro_batches;
  report.flops_per_rank = values[2] / s_.mesh.world().size();
  report.computed_flops_per_rank = values[3] / s_.mesh.world().size();
  report.requests = static_cast<std::int64_t>(values[4]);
  for (std::size_t i = head - sums.aux.size(); i < head; ++i)
    report.aux_losses.push_back(values[i] / micro_batches);
  report.aux_loss = std::accumulate(report.aux_losses.begin(), report.aux_losses.end(), 0.0);
  const ExpertUse use = expert_use(s_.config);
  const double assignments =
      static_cast<double>(s_.run.tokens_per_step() * use.rows) / static_cast<double>(use.tokens);
  const double mixtures = static_cast<double>(sums.assigned.size());
  report.dropped = mixtures > 0 ? values[5] / (mixtures * assignments) : 0;
  std::size_t at = head;
  for (const auto& layer : sums.assigned) {
    const auto begin = values.begin() + static_cast<std::ptrdiff_t>(at);
    report.assigned.emplace_back(begin, begin + static_cast<std::ptrdiff_t>(layer.size()));
    report.expert_load.emplace_back(layer.size());
    for (double& share : report.expert_load.back()) share = values[at++] / assignments;
  }
  if (s_.teacher == nullptr) return;
  report.distill_loss = values[at] / static_cast<double>(report.targets);
  report.teacher_flops_per_rank = values[at + 1] / s_.mesh.world().size();
}

StepReport Trainer::step(std::int64_t step, std::int64_t request) {
  const auto start = std::chrono::steady_clock::now();
  Exec& ex = s_.memory.exec;
  s_.memory.ledger.clear();
  s_.params.forget_gradients();

  StepReport report;
  report.step = step;
  report.targets = count_targets(step);
  const StepSums sums = accumulate(step, report.targets);
  s_.reducer.finish(ex);
  reduce(sums, request, report);

  report.lr = learning_rate(s_.run, step);
  report.grad_norm = s_.optimizer.gradient_norm(ex, s_.mesh.world());
  // Every rank sees the same sums, so every rank decides the same.
  report.skipped = !std::isfinite(report.loss) || !std::isfinite(report.distill_loss) ||
                   !std::isfinite(report.aux_loss) || !std::isfinite(report.grad_norm);
  if (report.skipped) {
    report.culprit = s_.optimizer.first_nonfinite(ex);
  } else {
    s_.optimizer.update(ex, learning_rates(s_.run, step), report.grad_norm, step);
    s_.reducer.gather_values(ex);
    update_router_biases(ex, s_.params, s_.config, report.assigned, s_.run.router.bias_rate);
    update_router_loads(ex, s_.params, s_.config, report.assigned);
  }
  report.bytes_sent = s_.memory.ledger.total().bytes_sent;
  if (ex.device.type == DeviceType::kCpu) report.seconds_waited = s_.memory.ledger.seconds_waited();
  report.tensors_peak = s_.memory_use().total();
  report.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return report;
}

}  // namespace upmoe
