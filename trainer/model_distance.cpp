#include "trainer/model_distance.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "trainer/evaluation.h"

namespace upmoe {
namespace {

// log of the sum of exponentials of one token's logits.
double log_sum(const float* logits_V, std::int64_t V) {
  const double top = *std::max_element(logits_V, logits_V + V);
  double sum = 0;
  for (std::int64_t v = 0; v < V; ++v) sum += std::exp(logits_V[v] - top);
  return top + std::log(sum);
}

// Sum over v of p_v (log p_v - log q_v), p and q the softmaxes of these logits.
double divergence_of(const float* p_V, const float* q_V, std::int64_t V) {
  const double p_log_sum = log_sum(p_V, V), q_log_sum = log_sum(q_V, V);
  double sum = 0;
  for (std::int64_t v = 0; v < V; ++v) {
    const double log_p = p_V[v] - p_log_sum;
    sum += std::exp(log_p) * (log_p - (q_V[v] - q_log_sum));
  }
  return sum;
}

}  // namespace

ModelDistance distance_between(RankModel& model, RankModel& origin, const TokenDataset& data,
                               std::int64_t sequences) {
  const std::int64_t S = data.seq_len(), V = model.config.vocab_size;
  UPMOE_CHECK(V == origin.config.vocab_size, "vocabularies of {} and {}", V, origin.config.vocab_size);
  const std::int64_t n = std::min(sequences, data.num_sequences());
  if (n == 0) fail(ExitCode::kBadInput, "the tokens have no whole sequence of {}", S);
  std::vector<float> origin_SV(static_cast<std::size_t>(S * V));
  ModelDistance sum;
  for (std::int64_t i = 0; i < n; ++i) {
    const EvalOptions one{.sequences = 1, .micro_batch = 1, .begin = i};
    sum.origin_loss += evaluate(origin, data, one, [&](std::int64_t row, ConstTensorView logits_CV) {
                         std::copy_n(logits_CV.as<float>(), logits_CV.elements(), origin_SV.data() + row * V);
                       }).loss;
    sum.loss += evaluate(model, data, one, [&](std::int64_t row, ConstTensorView logits_CV) {
                  for (std::int64_t r = 0; r < logits_CV.rows(); ++r)
                    sum.divergence +=
                        divergence_of(origin_SV.data() + (row + r) * V, logits_CV.as<float>() + r * V, V);
                }).loss;
  }
  const auto count = static_cast<double>(n);
  return {sum.loss / count, sum.origin_loss / count, sum.divergence / (count * static_cast<double>(S)),
          n * S};
}

}  // namespace upmoe
