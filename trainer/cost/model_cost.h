#pragma once
// What a model costs: parameters from the one list of them, FLOPs from the ledger of rehearsed steps, bytes from what
// a rehearsed rank holds. Nothing is computed and no weight is read.
//
// activated               of the routed experts what a token uses on the mean (configs/expert_use.h): top-k where
//                         tokens choose; the shared one, routers and all the rest; the embedding and the head once
//                         each (once together when they are tied)
// activated_non_embedding the same without embedding and head
// multiplied              weights of products that a token goes through: activated without the rows of the embedding,
//                         norms and biases; the head, routers and the shared expert's gate included
// forward FLOPs per token 2 * multiplied + sum over layers of 4 * pairs * heads * head_dim; pairs of a token in the
//                         mean (s + 1) / 2, fewer in a window. Mixtures of tokens: 4 * experts * hidden_size more a
//                         layer; adapters that are one product: its zeros more. Training: three times that, less where
//                         adapters train alone.
// Padding, masked documents and experts without tokens change nothing in what is counted here.

#include <cstdint>

#include "configs/model_config.h"
#include "configs/param_table.h"
#include "configs/run_choices.h"
#include "trainer/session.h"

namespace upmoe {

struct CostQuestion {
  std::int64_t seq_len = 4096;  // tokens
  Recompute recompute = Recompute::kNone;
};

struct WeightCounts {
  ParamCounts parameters;
  std::int64_t routed = 0;             // of `total`, in routed experts
  std::int64_t multiplied = 0;         // per token
  std::int64_t multiplied_routed = 0;  // of those, in routed experts
};
WeightCounts count_weights(const ModelConfig& model);

std::int64_t kv_bytes_per_token(const ModelConfig& model);  // bf16 keys and values of all layers

struct ModelCost : WeightCounts {
  std::int64_t seq_len = 0;
  // Per token, in the mean over a sequence.
  double forward_flops = 0, train_flops = 0;
  double attention_flops = 0;  // of forward_flops, what attention's ops book
  double again_flops = 0;      // what recomputation does a second time, beside train_flops
  MemoryUse adamw, adamw8bit;  // bf16 weights and gradients, one rank that holds everything; no activations
  std::int64_t kv_bytes = 0;   // per token

  double expert_share() const;  // of all parameters
  double sparsity() const;      // share of the parameters that a token leaves out
  std::int64_t weight_bytes(std::int64_t bytes_per_weight) const {
    return parameters.total * bytes_per_weight;
  }
};

// Throws Error(kUsage) when seq_len is beyond what a step can be rehearsed for.
ModelCost model_cost(const ModelConfig& model, const CostQuestion& question);

// Hours of one device that computes `flops` at `share` (MFU) of its peak.
double device_hours(double flops, double peak_flops_per_s, double share);

}  // namespace upmoe
