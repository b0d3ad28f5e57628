#include "trainer/trainer.h"

#include <chrono>
#include <cmath>

#include "trainer/schedule.h"

namespace upmoe {

StepSums Trainer::accumulate() {
  Exec& ex = s_.memory.exec;
  const RunConfig& run = s_.run;
  const double micro_batches = static_cast<double>(run.train.global_batch / run.train.micro_batch);
  Pipeline::Step step{.batches = *s_.batches};
  step.loss_scale = 1.0 / static_cast<double>(run.train.global_batch * run.data.seq_len);
  step.balance.kind = run.router.aux_kind;
  step.balance.aux_coefficient = run.router.aux_loss / micro_batches;
  step.balance.z_coefficient = run.router.z_loss / micro_batches;
  step.before_block = [&](int block) { s_.reducer.await_values(ex, block); };
  step.block_done = [&](int block, bool last) { s_.reducer.ready(ex, block, last); };
  return s_.pipeline.run(ex, step);
}

// One small all-reduce for everything the ranks tell each other about a step.
void Trainer::reduce(const StepSums& sums, std::int64_t request, StepReport& report) {
  const Cost cost = s_.memory.ledger.total();
  std::vector<double> values{sums.loss,
                             sums.aux,
                             sums.z,
                             cost.model_flops,
                             cost.model_flops + cost.model_again,
                             static_cast<double>(request)};
  const std::size_t head = values.size();
  for (const auto& layer : sums.assigned) values.insert(values.end(), layer.begin(), layer.end());
  s_.mesh.world().all_reduce(host_view(values.data(), {static_cast<std::int64_t>(values.size())}),
                             ReduceOp::kSum, s_.memory.exec);

  const double micro_batches = static_cast<double>(s_.run.train.global_batch / s_.run.train.micro_batch);
  report.loss = values[0] / static_cast<double>(s_.run.train.global_batch * s_.run.data.seq_len);
  report.aux_loss = values[1] / micro_batches;
  report.z_loss = values[2] / micro_batches;
  report.flops_per_rank = values[3] / s_.mesh.world().size();
  report.computed_flops_per_rank = values[4] / s_.mesh.world().size();
  report.requests = static_cast<std::int64_t>(values[5]);
  const double assignments =
      static_cast<double>(s_.run.train.global_batch * s_.run.data.seq_len * s_.config.num_experts_per_tok);
  std::size_t at = head;
  for (const auto& layer : sums.assigned) {
    report.expert_load.emplace_back(layer.size());
    for (double& share : report.expert_load.back()) share = values[at++] / assignments;
  }
}

StepReport Trainer::step(std::int64_t step, std::int64_t request) {
  const auto start = std::chrono::steady_clock::now();
  Exec& ex = s_.memory.exec;
  s_.memory.ledger.clear();
  s_.params.zero_gradients(ex);

  StepReport report;
  report.step = step;
  const StepSums sums = accumulate();
  s_.reducer.finish(ex);
  reduce(sums, request, report);

  report.lr = learning_rate(s_.run, step);
  report.grad_norm = s_.optimizer.gradient_norm(ex, s_.mesh.world());
  // Every rank sees the same sums, so every rank decides the same.
  report.skipped =
      !std::isfinite(report.loss) || !std::isfinite(report.aux_loss) || !std::isfinite(report.grad_norm);
  if (report.skipped) {
    report.culprit = s_.optimizer.first_nonfinite(ex);
  } else {
    s_.optimizer.update(ex, report.lr, report.grad_norm, step);
    s_.reducer.gather_values(ex);
  }
  report.bytes_sent = s_.memory.ledger.total().bytes_sent;
  report.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return report;
}

}  // namespace upmoe
