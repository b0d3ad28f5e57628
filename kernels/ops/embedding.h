#pragma once
// Token embedding. tokens_T: int32.

#include "kernels/core/exec.h"
#include "kernels/ops/vocab_shard.h"

namespace upmoe::ops {

// x_TD = rows of w_VD, which holds the tokens of `shard`; zero for tokens that other shards hold, so that the
// shards' results add up to the embedding exactly. A token outside the whole vocabulary throws
// Error(kBadInput) that names its position and value.
void embedding_forward(Exec& ex, TensorView x_TD, ConstTensorView tokens_T, ConstTensorView w_VD,
                       VocabShard shard = {});

// dw_VD (+)= rows of dx_TD whose token the shard holds; each row of dw has one writer and adds its tokens in
// token order, summed in fp32. Overwritten, rows of other tokens become zeros.
void embedding_backward(Exec& ex, GradientView dw_VD, ConstTensorView dx_TD, ConstTensorView tokens_T,
                        VocabShard shard = {});

}  // namespace upmoe::ops
