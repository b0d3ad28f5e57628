#pragma once
// What routers of every kind do with a token's row of E values.

#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>

#include "kernels/core/tensor.h"
#include "kernels/cpu/parallel_for.h"
#include "kernels/cpu/simd.h"
#include "kernels/ops/findings.h"
#include "kernels/ops/routing.h"

namespace upmoe::cpu {

// The first logit that is not finite, or -1.
inline std::int64_t first_non_finite(const float* x, std::int64_t n) {
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const f32x16 zero_or_nan = load(x + i) * 0.0f;  // inf * 0 is NaN as well
    if (reduce_add(zero_or_nan) != 0.0f) break;
  }
  for (; i < n; ++i)
    if (!std::isfinite(x[i])) return i;
  return -1;
}

inline void require_finite(const float* logits, std::int64_t tokens, std::int64_t experts) {
  constexpr std::int64_t kBlock = 64;
  std::atomic<std::int64_t> first{std::numeric_limits<std::int64_t>::max()};
  parallel_for((tokens + kBlock - 1) / kBlock, kBlock * experts, [&](std::int64_t b) {
    const std::int64_t begin = b * kBlock * experts, end = std::min(tokens, (b + 1) * kBlock) * experts;
    const std::int64_t found = first_non_finite(logits + begin, end - begin);
    // The lowest of all threads' findings wins, so that the message does not depend on who came first.
    std::int64_t seen = first.load();
    while (found >= 0 && begin + found < seen && !first.compare_exchange_weak(seen, begin + found)) {
    }
  });
  const std::int64_t at = first.load();
  if (at != std::numeric_limits<std::int64_t>::max())
    fail_logit(at / experts, at % experts, fmt::format("{}", logits[at]));
}

inline void require_in_range(const std::int32_t* index, std::int64_t n, std::int64_t limit, const char* what,
                             std::int32_t least = 0) {
  for (std::int64_t i = 0; i < n; ++i)
    UPMOE_CHECK(index[i] >= least && index[i] < limit, "{} [{}] is {}, expected [{}, {})", what, i, index[i],
                least, limit);
}

// The balance terms' gradient of each token's probabilities.
class AuxRows {
 public:
  AuxRows(const TermGradient& terms, std::int64_t tokens)
      : aux_(terms.aux.as<float>()), experts_(terms.aux.shape[terms.aux.shape.rank - 1]) {
    if (!terms.row_T.given()) return;
    row_ = terms.row_T.as<std::int32_t>();
    require_in_range(row_, tokens, terms.aux.shape[0], "row_T");
  }
  const float* of(std::int64_t token) const { return row_ == nullptr ? aux_ : aux_ + row_[token] * experts_; }

 private:
  const float* aux_;
  const std::int32_t* row_ = nullptr;
  std::int64_t experts_;
};

// The k largest of a row, found by insertion; only a strictly larger value passes an earlier one, so among equals the
// expert that was offered first stays in front.
struct TopK {
  std::int32_t* index;
  float* value;
  std::int64_t k, found = 0;

  void offer(std::int64_t e, float p) {
    // value[0, found) is sorted, the largest first; what falls off its end is no longer one of the k.
    if (found == k && !(p > value[k - 1])) return;
    std::int64_t at = found < k ? found++ : k - 1;
    for (; at > 0 && p > value[at - 1]; --at) {
      value[at] = value[at - 1];
      index[at] = index[at - 1];
    }
    value[at] = p;
    index[at] = static_cast<std::int32_t>(e);
  }
};

}  // namespace upmoe::cpu
