#include "trainer/cost/roofline.h"

#include <algorithm>
#include <cmath>

#include "trainer/rehearsal.h"

namespace upmoe {

namespace {

double peak_flops_per_s(const Machine& machine, DType dtype) {
  if (dtype == DType::kBF16) return machine.peak_flops_per_s();
  if (machine.fp32_tflops == 0)
    fail(ExitCode::kUsage,
         "machine '{}' has no fp32_tflops, by which times in fp32 go; add it, or ask for bf16", machine.name);
  return machine.fp32_tflops * 1e12;
}

double longer(double bytes, double flops, DType dtype, const Machine& machine, const Attained& attained) {
  return std::max(bytes / (machine.bytes_per_s() * attained.bandwidth),
                  flops / (peak_flops_per_s(machine, dtype) * attained.products));
}

// Of routed experts of `bytes`, those that `tokens` choose.
double chosen_bytes(const ServedModel& m, double bytes, double tokens) {
  return m.experts > 0 ? bytes * expected_experts(m, tokens) / m.experts : 0.0;
}

}  // namespace

ServedModel::ServedModel(const ModelConfig& model, std::int64_t prompt, DType of_numbers)
    : dtype(of_numbers),
      experts(model.num_experts),
      experts_per_token(model.num_experts_per_tok),
      window(static_cast<double>(model.sliding_window)) {
  if (model.routes_groups())
    fail(ExitCode::kUsage,
         "router.kind {} gives a token what the tokens of other sequences leave to it: such a model "
         "is trained, not served, and has no time to serve it; ask for what it costs to train",
         name_of(model.router.kind));
  const WeightCounts weights = count_weights(model);
  const auto size = static_cast<double>(size_of(dtype));
  weight_bytes = size * static_cast<double>(weights.parameters.total);
  fixed_bytes = size * static_cast<double>(weights.multiplied - weights.multiplied_routed);
  routed_bytes = size * static_cast<double>(weights.routed);
  if (model.is_moe_layer(model.num_hidden_layers - 1))
    last_routed_bytes = routed_bytes / static_cast<double>(model.num_moe_layers());
  kv_bytes = static_cast<double>(kv_bytes_per_token(model)) * (size / 2);
  token_flops = 2 * static_cast<double>(weights.multiplied);
  prompt_tokens = static_cast<double>(prompt);
  prompt_flops = rehearse_prompt(model, prompt).total().model_flops;
  // Of a token that sees itself alone.
  context_flops = rehearse_forward(model, 1).total().attention_flops;
}

double ServedModel::mean_context(double output) const {
  return prompt_tokens + output / 2;
}

double ServedModel::seen(double context) const {
  return window > 0 ? std::min(context, window) : context;
}

double expected_experts(const ServedModel& m, double tokens) {
  if (m.experts == 0) return 0;
  return m.experts * (1 - std::pow(1 - m.experts_per_token / m.experts, tokens));
}

double decode_seconds(const ServedModel& m, const Machine& machine, double batch, double context,
                      const Attained& attained) {
  return longer(m.fixed_bytes + chosen_bytes(m, m.routed_bytes, batch) + batch * m.seen(context) * m.kv_bytes,
                batch * (m.token_flops + m.seen(context) * m.context_flops), m.dtype, machine, attained);
}

double prefill_seconds(const ServedModel& m, const Machine& machine, double batch, const Attained& attained) {
  const double tokens = batch * m.prompt_tokens,
               routed = chosen_bytes(m, m.routed_bytes - m.last_routed_bytes, tokens) +
                        chosen_bytes(m, m.last_routed_bytes, batch);
  return longer(m.fixed_bytes + routed + tokens * m.kv_bytes, batch * m.prompt_flops, m.dtype, machine,
                attained);
}

std::int64_t sequences_that_fit(const ServedModel& m, const Machine& machine, double context, double share) {
  const double left = machine.memory_gb * 1e9 * share - m.weight_bytes;
  return left <= 0 ? 0 : static_cast<std::int64_t>(left / (m.seen(context) * m.kv_bytes));
}

double requests_per_s(const ServedModel& m, const Machine& machine, double output, double memory_share,
                      const Attained& attained) {
  const double context = m.mean_context(output);
  const double batch = static_cast<double>(sequences_that_fit(m, machine, context, memory_share));
  if (batch == 0) return 0;
  return batch / ((output - 1) * decode_seconds(m, machine, batch, context, attained) +
                  prefill_seconds(m, machine, batch, attained));
}

}  // namespace upmoe
