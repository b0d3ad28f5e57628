#pragma once
// Dense and mixture FFNs in double, by the book, over tensors named as on disk: the judge of what upcycling writes.

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <string>
#include <vector>

#include "configs/families/family.h"
#include "kernels/core/check.h"
#include "tests/support/tolerance.h"

namespace upmoe::test {

using NaiveVector = std::vector<double>;
using NaiveTensors = std::map<std::string, NaiveVector>;  // flat, row-major

// How far, of the norm of its outputs, a mixture strays that keeps its source's function. In double: a term of an
// output has three factors (gate, up, down), of which a scale may have rounded each once in the file.
inline constexpr double kRoundedFactors = 3 * kUnit;
// In fp32, as a report says it, rounded on both sides: sums over the hidden state for experts and router, over the
// neurons that a token uses, over the experts' probabilities and over its experts.
inline double rounding_of_layer(const ModelConfig& moe) {
  const std::int64_t neurons =
      moe.num_experts_per_tok * moe.moe_intermediate_size + moe.shared_expert_intermediate_size;
  return rounding_of_sums(
      static_cast<double>(2 * (2 * moe.hidden_size + neurons + moe.num_experts + moe.num_experts_per_tok)));
}

inline const NaiveVector& tensor(const NaiveTensors& tensors, const std::string& name) {
  const auto it = tensors.find(name);
  UPMOE_CHECK(it != tensors.end(), "no tensor {}", name);
  return it->second;
}

// W x, W [rows, x.size()]
inline NaiveVector product(const NaiveVector& w, const NaiveVector& x) {
  UPMOE_CHECK(!x.empty() && w.size() % x.size() == 0, "{} weights for {} inputs", w.size(), x.size());
  NaiveVector y(w.size() / x.size(), 0.0);
  for (std::size_t r = 0; r < y.size(); ++r) {
    for (std::size_t c = 0; c < x.size(); ++c) y[r] += w[r * x.size() + c] * x[c];
  }
  return y;
}

// The tensors of one SwiGLU by their names on disk.
struct NaiveFfn {
  std::string gate, up, down;
};

// down(silu(gate x) * up x)
inline NaiveVector naive_ffn(const NaiveTensors& tensors, const NaiveFfn& names, const NaiveVector& x) {
  NaiveVector h = product(tensor(tensors, names.gate), x);
  const NaiveVector up = product(tensor(tensors, names.up), x);
  for (std::size_t j = 0; j < h.size(); ++j) h[j] = h[j] / (1 + std::exp(-h[j])) * up[j];
  return product(tensor(tensors, names.down), h);
}

// Of the family that the model is of.
inline std::string name_on_disk(const ModelConfig& model, Role role, int layer, std::size_t expert = 0,
                                Half half = Half::kWhole) {
  for (const TensorName& t : family_of(model).tensors)
    if (t.role == role && t.half == half) return t.of(layer, static_cast<std::int64_t>(expert));
  fail(ExitCode::kFailure, "{} has no tensor for {}", model.model_type, name_of(role));
}
inline NaiveFfn ffn_names(const ModelConfig& model, Role gate_up, Role down, int layer,
                          std::size_t expert = 0) {
  return {name_on_disk(model, gate_up, layer, expert, Half::kGate),
          name_on_disk(model, gate_up, layer, expert, Half::kUp), name_on_disk(model, down, layer, expert)};
}

// What an expert's weight is before it is scaled, of all experts: a softmax, or sigmoids.
inline NaiveVector naive_scores(const ModelConfig& model, NaiveVector logits) {
  const bool sigmoid = model.router.score == RouterScore::kSigmoid;
  const double top = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (double& v : logits) sum += v = sigmoid ? 1 / (1 + std::exp(-v)) : std::exp(v - top);
  if (!sigmoid)
    for (double& v : logits) v /= sum;
  return logits;
}

// The k largest scores (lowest index first among equals), renormalised if the model says so; plus the shared expert,
// times the sigmoid of its gate where it has one. Without groups, and with biases of zero.
inline NaiveVector naive_moe(const NaiveTensors& tensors, const ModelConfig& model, int layer,
                             const NaiveVector& x) {
  const NaiveVector p =
      naive_scores(model, product(tensor(tensors, name_on_disk(model, Role::kRouter, layer)), x));
  std::vector<std::size_t> order(p.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return p[a] > p[b]; });
  order.resize(static_cast<std::size_t>(model.num_experts_per_tok));
  double sum = 1;
  if (model.norm_topk_prob) {
    sum = 0;
    for (const std::size_t e : order) sum += p[e];
  }
  NaiveVector y(x.size(), 0.0);
  for (const std::size_t e : order) {
    const NaiveVector y_e =
        naive_ffn(tensors, ffn_names(model, Role::kExpertGateUp, Role::kExpertDown, layer, e), x);
    for (std::size_t d = 0; d < y.size(); ++d) y[d] += model.router.scale * p[e] / sum * y_e[d];
  }
  if (model.shared_expert_intermediate_size > 0) {
    double open = 1;
    if (model.shared_expert_gate)
      open += std::exp(-product(tensor(tensors, name_on_disk(model, Role::kSharedGate, layer)), x)[0]);
    open = 1 / open;
    const NaiveVector y_s =
        naive_ffn(tensors, ffn_names(model, Role::kSharedGateUp, Role::kSharedDown, layer), x);
    for (std::size_t d = 0; d < y.size(); ++d) y[d] += open * y_s[d];
  }
  return y;
}

}  // namespace upmoe::test
