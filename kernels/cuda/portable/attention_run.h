#pragma once
// A chunk of a prompt (CachedTokens::run) by tiles of queries and keys, where a key is loaded once for 64 of the
// queries (32 in heads of more than 128); heads of up to 256.

#include "kernels/ops/attention_decode.h"

namespace upmoe::cuda::portable {

// attention_decode for run > 0. The keys and values of the run are stored.
void attend_run(Exec& ex, TensorView out_TQ, ConstTensorView qkv_TH, const KeyCache& cache,
                const CachedTokens& tokens, const AttentionShape& shape);

}  // namespace upmoe::cuda::portable
