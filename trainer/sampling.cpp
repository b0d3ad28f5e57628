#include "trainer/sampling.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "kernels/core/check.h"
#include "kernels/core/philox.h"

namespace upmoe {

namespace {

// The first of the largest.
std::size_t most_likely(std::span<const float> logits_V, const DrawPlace& place) {
  std::size_t best = 0;
  for (std::size_t v = 0; v < logits_V.size(); ++v) {
    if (std::isnan(logits_V[v]) || logits_V[v] == INFINITY)
      fail(ExitCode::kNumeric,
           "row {}, position {}: the logit of token {} is {}: weights are not finite, or what they compute; "
           "`upmoe inspect --verify` reads every weight",
           place.row, place.position, v, logits_V[v]);
    if (logits_V[v] > logits_V[best]) best = v;
  }
  if (logits_V.empty() || logits_V[best] == -INFINITY)
    fail(ExitCode::kNumeric, "row {}, position {}: no token has a finite logit", place.row, place.position);
  return best;
}

// A number in (0, 1), of 53 bits.
double uniform(const SamplingRule& rule, const DrawPlace& place) {
  const std::uint64_t key = philox_key(rule.seed, "sampling");
  const Philox4 bits =
      philox(key, static_cast<std::uint64_t>(place.position), static_cast<std::uint64_t>(place.row));
  const std::uint64_t word = (std::uint64_t{bits[0]} << 32 | bits[1]) >> 12;
  return (static_cast<double>(word) + 0.5) * 0x1p-52;
}

// Tokens that may be drawn, the likeliest first and equals by their number.
struct Candidates {
  std::vector<std::size_t> token;
  std::vector<double> weight;  // its probability over that of the likeliest
};

void keep_likeliest(Candidates& all, std::size_t n) {
  std::vector<std::size_t> order(all.token.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  const auto before = [&](std::size_t a, std::size_t b) {
    return all.weight[a] != all.weight[b] ? all.weight[a] > all.weight[b] : a < b;
  };
  n = std::min(n, order.size());
  std::partial_sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(n), order.end(), before);
  Candidates kept;
  for (std::size_t i = 0; i < n; ++i) {
    kept.token.push_back(all.token[order[i]]);
    kept.weight.push_back(all.weight[order[i]]);
  }
  all = std::move(kept);
}

void keep_share(Candidates& sorted, double share) {
  const double wanted = share * std::accumulate(sorted.weight.begin(), sorted.weight.end(), 0.0);
  double sum = 0;
  std::size_t n = 0;
  do {
    sum += sorted.weight[n++];
  } while (n < sorted.weight.size() && sum < wanted);
  sorted.token.resize(n);
  sorted.weight.resize(n);
}

}  // namespace

std::int32_t next_token(std::span<const float> logits_V, const SamplingRule& rule, const DrawPlace& place) {
  const std::size_t best = most_likely(logits_V, place);
  if (rule.temperature == 0) return static_cast<std::int32_t>(best);
  Candidates all;
  all.token.resize(logits_V.size());
  std::iota(all.token.begin(), all.token.end(), std::size_t{0});
  const double largest = static_cast<double>(logits_V[best]);
  for (const float logit : logits_V)
    all.weight.push_back(std::exp((static_cast<double>(logit) - largest) / rule.temperature));
  if (rule.top_k > 0 || rule.top_p < 1)
    keep_likeliest(all, rule.top_k > 0 ? static_cast<std::size_t>(rule.top_k) : all.token.size());
  if (rule.top_p < 1) keep_share(all, rule.top_p);
  const double drawn = uniform(rule, place) * std::accumulate(all.weight.begin(), all.weight.end(), 0.0);
  double sum = 0;
  std::size_t last = 0;  // with a weight: rounding may leave the sum below what was drawn
  for (std::size_t i = 0; i < all.token.size(); ++i) {
    if (all.weight[i] == 0) continue;
    last = i;
    sum += all.weight[i];
    if (sum > drawn) break;
  }
  return static_cast<std::int32_t>(all.token[last]);
}

}  // namespace upmoe
