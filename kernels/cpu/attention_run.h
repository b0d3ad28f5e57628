#pragma once
// A run of tokens (CachedTokens::run) over what is kept of their row, by blocks of queries and keys.

#include "kernels/ops/attention_decode.h"

namespace upmoe::cpu {

// Writes the rows of out_TQ that are of the run. Its keys and values are stored.
void attend_run(Exec& ex, TensorView out_TQ, ConstTensorView qkv_TH, const KeyCache& cache,
                const CachedTokens& tokens, const AttentionShape& shape);

}  // namespace upmoe::cpu
