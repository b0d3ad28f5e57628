#pragma once
// How long one device takes to serve a model, at best: the longer of what its memory and its products need. Everything
// in one dtype on one device; nothing is measured.
//
// A decoding step of B sequences with c tokens of context each reads every weight that is multiplied once, of the
// routed experts those that at least one of B tokens chose, E (1 - (1 - k/E)^B) of E when choices are independent and
// even, and the keys and values of B * c tokens. It computes B * (2 * multiplied + 4 * c * heads * head_dim summed over
// layers) FLOPs. Where attention has a window, c is at most that. Of a prompt's tokens the last layer's experts compute
// the last one alone.

#include <cstdint>

#include "configs/machine.h"
#include "trainer/cost/model_cost.h"

namespace upmoe {

struct ServedModel {
  // `prompt` tokens are prefilled at a time. `of_numbers`: of weights, keys and values, bf16 or fp32. Error(kUsage) for
  // routers of groups, which nobody serves.
  ServedModel(const ModelConfig& model, std::int64_t prompt, DType of_numbers = DType::kBF16);

  DType dtype;
  double experts = 0, experts_per_token = 0;
  double weight_bytes = 0;       // of all parameters: what stays on the device
  double fixed_bytes = 0;        // of what is multiplied: outside routed experts
  double routed_bytes = 0;       // of all routed experts
  double last_routed_bytes = 0;  // of those, the last layer's
  double kv_bytes = 0;           // per token
  double token_flops = 0;        // products of one token
  double context_flops = 0;      // attention of one token to one token of context
  double prompt_flops = 0;       // of a whole prompt up to its last token's logits, from the ledger
  double prompt_tokens = 0;
  double window = 0;  // tokens; 0: attention has none

  double mean_context(double output) const;  // over a request that answers with so many tokens
  double seen(double context) const;         // of the context, what a token attends to and the cache keeps
};

// Of a device's data sheet, what is reached.
struct Attained {
  double bandwidth = 1, products = 1;  // shares
};

double expected_experts(const ServedModel& model,
                        double tokens);  // of a layer, that at least one token chose
// Times in fp32 need a machine with fp32_tflops: Error(kUsage).
double decode_seconds(const ServedModel& model, const Machine& machine, double batch, double context,
                      const Attained& attained = {});
// Of `batch` prompts together.
double prefill_seconds(const ServedModel& model, const Machine& machine, double batch,
                       const Attained& attained = {});
// Sequences of `context` tokens whose keys and values fit beside all weights in a share of the memory.
std::int64_t sequences_that_fit(const ServedModel& model, const Machine& machine, double context,
                                double share);
// Requests per second of a device that keeps as many sequences going as fit, each of a prompt and `output` tokens, the
// first of which comes of the prompt.
double requests_per_s(const ServedModel& model, const Machine& machine, double output, double memory_share,
                      const Attained& attained);

}  // namespace upmoe
