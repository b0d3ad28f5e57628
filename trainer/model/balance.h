#pragma once
// Router balance terms of one micro-batch, over all ranks that share its tokens and all chunks of a pipeline:
// value and gradient from the sums that ops::balance_stats takes.
//
//   hf      E * sum_e f_e P_e over the pool of all MoE layers' tokens; f_e = assignments of e (all k) / pool,
//           P_e = mean probability; transformers' load_balancing_loss_func; balanced value k
//   switch  per layer E * sum_e f_e P_e with f_e = share of tokens whose first choice is e; summed over layers
//           (Fedus et al. 2021); balanced value = number of MoE layers
//   z       per layer mean of logsumexp(logits)^2, summed over layers (Zoph et al. 2022)
// f is a constant for the gradient.

#include <span>
#include <string>
#include <vector>

#include "kernels/core/exec.h"

namespace upmoe {

enum class AuxKind { kHf, kSwitch };
AuxKind aux_kind_from(const std::string& name);

struct BalanceConfig {
  AuxKind kind = AuxKind::kHf;
  double aux_coefficient = 0;  // already divided by the number of micro-batches of the step
  double z_coefficient = 0;    // likewise
};

// What one layer counted over its micro-batch, E values each.
struct LayerLoad {
  std::int64_t tokens = 0;
  std::vector<double> assigned, first_choice, probability;
  double z_sum = 0;
};

// The layers of a micro-batch added up, over all chunks of a pipeline.
struct LoadPool {
  double tokens = 0;
  std::vector<double> assigned, probability;  // empty before the first layer
  void add(const LayerLoad& load);
  void add(const LoadPool& other);
};

struct BalanceTerms {
  double aux = 0, z = 0;  // before their coefficients; summed over the chunks they are the micro-batch's
  // Per layer: d(coefficient * aux) / d(probability of e), any token.
  std::vector<std::vector<float>> aux_gradient;
  std::vector<float> z_scale;  // per layer: d(coefficient * z) / d(lse^2) of one token
};
// The terms of one chunk's layers. `all`: the pool of all chunks; its value is counted where `count_pool`.
BalanceTerms balance_terms(const BalanceConfig& config, std::span<const LayerLoad> layers,
                           const LoadPool& all, bool count_pool);

}  // namespace upmoe
