#include "trainer/cost/model_cost.h"

#include "configs/expert_use.h"
#include "trainer/rehearsal.h"

namespace upmoe {

namespace {

constexpr std::int64_t kBF16Bytes = 2;

// Or as many as routers route together.
RunConfig one_sequence(const ModelConfig& model, const CostQuestion& q) {
  RunConfig run;
  run.data.seq_len = q.seq_len;
  run.train.global_batch = run.train.micro_batch = least_sequences(model);
  run.train.precision = Precision::kBf16;
  run.train.recompute = q.recompute;
  run.parallel.reduce = Precision::kBf16;
  return run;
}

// Rows of the embedding are looked up, not multiplied, unless they are the head as well.
bool is_multiplied(const ParamSpec& p) {
  return p.trained && p.decay && (p.role != Role::kEmbedding || p.tied);
}

// One rank that holds everything, before a step: what is kept from step to step.
MemoryUse kept_by(const ModelConfig& model, RunConfig run, OptimizerKind optimizer) {
  run.optimizer.name = optimizer;
  MemoryUse use = Rehearsal(run, model, 0, 1).memory_use();
  use.activations = use.scratch = use.buckets = 0;
  return use;
}

}  // namespace

WeightCounts count_weights(const ModelConfig& model) {
  WeightCounts counts;
  counts.parameters = count_params(model);
  const ExpertUse use = expert_use(model);
  for (const ParamSpec& p : make_param_table(model)) {
    const std::int64_t weights = p.shape.elements(),
                       used = p.expert ? weights / model.num_experts * use.rows / use.tokens : weights;
    if (p.expert) counts.routed += weights;
    if (p.expert) counts.multiplied_routed += used;
    if (is_multiplied(p)) counts.multiplied += used;
  }
  return counts;
}

std::int64_t kv_bytes_per_token(const ModelConfig& model) {
  return 2 * kBF16Bytes * model.num_hidden_layers * model.num_key_value_heads * model.head_dim;
}

double ModelCost::expert_share() const {
  return static_cast<double>(routed) / static_cast<double>(parameters.total);
}

double ModelCost::sparsity() const {
  return 1.0 - static_cast<double>(parameters.activated) / static_cast<double>(parameters.total);
}

ModelCost model_cost(const ModelConfig& model, const CostQuestion& question) {
  constexpr std::int64_t kLongest = std::int64_t{1} << 24;  // a rehearsal has a sequence of numbers in memory
  if (question.seq_len < 1 || question.seq_len > kLongest)
    fail(ExitCode::kUsage, "--seq-len {}: expected 1 to {} tokens", question.seq_len, kLongest);
  ModelCost cost;
  static_cast<WeightCounts&>(cost) = count_weights(model);
  cost.seq_len = question.seq_len;
  const RunConfig run = one_sequence(model, question);
  const double tokens = static_cast<double>(question.seq_len * run.train.micro_batch);
  const Cost forward = rehearse_forward(model, question.seq_len).total();
  cost.forward_flops = forward.model_flops / tokens;
  cost.attention_flops = forward.attention_flops / tokens;
  Rehearsal rehearsal(run, model, 0, 1);
  const Cost step = rehearsal.step().total();
  cost.train_flops = step.model_flops / tokens;
  cost.again_flops = step.model_again / tokens;
  cost.adamw = kept_by(model, run, OptimizerKind::kAdamW);
  cost.adamw8bit = kept_by(model, run, OptimizerKind::kAdamW8bit);
  cost.kv_bytes = kv_bytes_per_token(model);
  return cost;
}

double device_hours(double flops, double peak_flops_per_s, double share) {
  return flops / (peak_flops_per_s * share * 3600.0);
}

}  // namespace upmoe
