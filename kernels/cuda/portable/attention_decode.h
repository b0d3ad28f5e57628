#pragma once
// Attention of new tokens by themselves, over what is kept of their rows; heads of up to 256.

#include "kernels/ops/attention_decode.h"

namespace upmoe::cuda::portable {

// attention_decode, whatever is said of a run.
void attend_tokens(Exec& ex, TensorView out_TQ, ConstTensorView qkv_TH, const KeyCache& cache,
                   const CachedTokens& tokens, const AttentionShape& shape);

}  // namespace upmoe::cuda::portable
