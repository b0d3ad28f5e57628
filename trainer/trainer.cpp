#include "trainer/trainer.h"

#include <chrono>
#include <cmath>

#include "trainer/schedule.h"

namespace upmoe {

namespace {

bool is_model_work(std::string_view op) {
  return op.starts_with("gemm") || op.starts_with("grouped_gemm") || op.starts_with("attention");
}

double model_flops(const Ledger& ledger) {
  double flops = 0;
  for (const auto& [op, cost] : ledger.entries())
    if (is_model_work(op)) flops += cost.flops;
  return flops;
}

MicroBatch micro_batch_of(const Batch& batch, std::int64_t seq_len) {
  MicroBatch micro{batch.tokens_T, batch.targets_T, {batch.positions_T, {}, seq_len}};
  if (batch.document_T.data != nullptr) micro.places.document_T = batch.document_T;
  return micro;
}

}  // namespace

// What this rank adds up over its micro-batches.
struct Trainer::Sums {
  double loss = 0, aux = 0, z = 0;
  std::vector<std::vector<double>> assigned;  // per MoE layer and expert
};

void Trainer::accumulate(Sums& sums) {
  Exec& ex = s_.memory.exec;
  const double micro_batches = static_cast<double>(s_.run.train.global_batch / s_.run.train.micro_batch);
  const double tokens = static_cast<double>(s_.run.train.global_batch * s_.run.data.seq_len);
  BalanceConfig balance;
  balance.kind = aux_kind_from(s_.run.router.aux_kind);
  balance.aux_coefficient = s_.run.router.aux_loss / micro_batches;
  balance.z_coefficient = s_.run.router.z_loss / micro_batches;

  const std::int64_t rounds = s_.loader->rounds();
  for (std::int64_t round = 0; round < rounds; ++round) {
    const Batch batch = s_.loader->next();
    const std::size_t mark = s_.memory.keep.mark();
    Transformer::Saved saved;
    sums.loss += s_.model.forward(ex, micro_batch_of(batch, s_.run.data.seq_len), 1.0 / tokens, balance,
                                  s_.memory.keep, saved);
    sums.aux += saved.balance.aux;
    sums.z += saved.balance.z;
    std::size_t moe = 0;
    for (const Block::Saved& b : saved.blocks) {
      if (b.load_3E.empty()) continue;
      if (sums.assigned.size() <= moe) sums.assigned.emplace_back(b.load_3E.size() / 3);
      for (std::size_t e = 0; e < sums.assigned[moe].size(); ++e) sums.assigned[moe][e] += b.load_3E[e];
      ++moe;
    }
    const bool last = round + 1 == rounds;
    s_.model.backward(ex, s_.memory.keep, saved, [&](int layer) {
      if (last) s_.reducer.ready(ex, layer);
    });
    s_.memory.keep.rewind(mark);
  }
}

// One small all-reduce for everything the ranks tell each other about a step.
void Trainer::reduce(const Sums& sums, std::int64_t request, StepReport& report) {
  std::vector<double> values{sums.loss, sums.aux, sums.z, model_flops(s_.memory.ledger),
                             static_cast<double>(request)};
  const std::size_t head = values.size();
  for (const auto& layer : sums.assigned) values.insert(values.end(), layer.begin(), layer.end());
  s_.mesh.world().all_reduce(host_view(values.data(), {static_cast<std::int64_t>(values.size())}),
                             ReduceOp::kSum);

  const double micro_batches = static_cast<double>(s_.run.train.global_batch / s_.run.train.micro_batch);
  report.loss = values[0] / static_cast<double>(s_.run.train.global_batch * s_.run.data.seq_len);
  report.aux_loss = values[1] / micro_batches;
  report.z_loss = values[2] / micro_batches;
  report.flops_per_rank = values[3] / s_.mesh.world().size();
  report.requests = static_cast<std::int64_t>(values[4]);
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
  Sums sums;
  accumulate(sums);
  s_.reducer.finish(ex);
  reduce(sums, request, report);

  report.lr = learning_rate(s_.run, step);
  report.grad_norm = s_.optimizer.gradient_norm(ex, s_.mesh.world());
  // Every rank sees the same sums, so every rank decides the same.
  report.skipped =
      !std::isfinite(report.loss) || !std::isfinite(report.aux_loss) || !std::isfinite(report.grad_norm);
  if (report.skipped) {
    report.culprit = s_.optimizer.first_nonfinite();
  } else {
    s_.optimizer.update(ex, report.lr, report.grad_norm, step);
    s_.reducer.gather_values(ex);
  }
  report.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return report;
}

}  // namespace upmoe
