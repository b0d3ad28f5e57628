#pragma once
// Cross-entropy and its gradient in double.

#include <algorithm>

#include "tests/support/random_tensor.h"
#include "tests/support/reference_model.h"

namespace upmoe::test {

struct Reference {  // of cross-entropy
  Values loss, dlogits;
};

inline Reference reference_cross_entropy(const Values& logits, const Values& targets, double scale) {
  const std::size_t rows = targets.size(), vocab = rows == 0 ? 1 : logits.size() / rows;
  Reference r{Values(rows), reference_softmax(logits, vocab)};
  for (std::size_t c = 0; c < rows; ++c) {
    double* d = r.dlogits.data() + c * vocab;
    if (targets[c] < 0) {
      std::fill_n(d, vocab, 0.0);
      continue;
    }
    const auto target = static_cast<std::size_t>(targets[c]);
    r.loss[c] = reference_lse(logits.data() + c * vocab, vocab) - logits[c * vocab + target];
    d[target] -= 1;
    for (std::size_t v = 0; v < vocab; ++v) d[v] *= scale;
  }
  return r;
}

// Every fourth is ignored.
inline HostTensor targets_for(std::int64_t rows, std::int64_t vocab) {
  HostTensor targets({rows}, DType::kI32);
  for (std::int64_t c = 0; c < rows; ++c)
    targets.set(static_cast<std::size_t>(c), c % 4 == 2 ? -1.0 : static_cast<double>(c * 7919 % vocab));
  return targets;
}

}  // namespace upmoe::test
