#pragma once
// Router balance terms of one micro-batch, over all ranks that share its tokens and all chunks of a pipeline:
// value and gradient from the sums that ops::balance_stats takes.
//
//   kHf     E * sum_e f_e P_e over the pool of all MoE layers' tokens; f_e = assignments of e (all k) / pool,
//           P_e = mean probability; transformers' load_balancing_loss_func; balanced value k
//   kSwitch per layer E * sum_e f_e P_e with f_e = share of tokens whose first choice is e; summed over layers
//           (Fedus et al. 2021); balanced value = number of MoE layers
//   z       per layer mean of logsumexp(logits)^2, summed over layers (Zoph et al. 2022)
// f is a constant for the gradient.

#include <span>
#include <vector>

#include "configs/run_choices.h"
#include "kernels/core/exec.h"

namespace upmoe {

struct BalanceConfig {
  AuxKind kind = AuxKind::kHf;
  double aux_coefficient = 0;  // already divided by the number of micro-batches of the step
  double z_coefficient = 0;    // likewise
};

// What one mixture's router counts over a micro-batch, on the device: the sums of ops::balance_stats, together.
struct RouterLoad {
  TensorView sums_L;                                                          // fp64
  static std::int64_t size(std::int64_t experts) { return 3 * experts + 1; }  // L
  explicit operator bool() const { return sums_L.shape.rank > 0; }
  std::int64_t experts() const { return sums_L.elements() / 3; }
  TensorView stats_3E() const { return sums_L.rows(0, 3 * experts()).reshape({3, experts()}); }
  TensorView z_1() const { return sums_L.rows(3 * experts(), sums_L.elements()); }
};

// One mixture's part in the balance terms of a micro-batch. The model sets `load` before forward (without one nothing
// is counted), the gradients between forward and backward.
struct RouterBalance {
  RouterLoad load;
  ConstTensorView aux_E;  // added to the gradient of every probability of expert e
  float z_scale = 0;      // that of lse^2 of every token
};

// What one layer counted over its micro-batch, E values each, on the host.
struct LayerLoad {
  std::int64_t tokens = 0;
  std::vector<double> assigned, first_choice, probability;
  double z_sum = 0;
  static LayerLoad unpack(std::int64_t tokens, std::span<const double> sums_L);  // of a RouterLoad
};

// The layers of a micro-batch added up, over all chunks of a pipeline.
struct LoadPool {
  double tokens = 0;
  std::vector<double> assigned, probability;  // empty before the first layer
  void add(const LayerLoad& load);
  void add(const LoadPool& other);

  // As it goes from stage to stage.
  static std::size_t packed_size(std::size_t experts) { return experts > 0 ? 2 * experts + 1 : 0; }
  std::vector<double> pack(std::size_t experts) const;
  static LoadPool unpack(std::span<const double> packed);
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
