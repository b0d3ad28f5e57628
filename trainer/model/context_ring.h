#pragma once
// Causal attention of sequences that are divided between the cp ranks (context_shards.h): keys and values go
// round the ring of ranks while each rank adds what its queries see of them to a running softmax; in the
// backward their gradients travel with them and take one more hop home. Pairs of chunks that no query sees
// through, later ones and those that a window has passed, cost nothing; without a window every rank has the same number
// of the others.

#include "kernels/ops/attention.h"
#include "parallel/communicator.h"

namespace upmoe {

// As ops::attention_forward and _backward, of this rank's tokens; shape.seq_len is the length of the whole
// sequences. document_T: this rank's, or absent. Collective over cp.
void ring_attention_forward(Exec& ex, Communicator& cp, TensorView out_TQ, TensorView lse_TN,
                            ConstTensorView qkv_TH, AttentionShape shape, ConstTensorView document_T);
void ring_attention_backward(Exec& ex, Communicator& cp, TensorView dqkv_TH, ConstTensorView dout_TQ,
                             ConstTensorView qkv_TH, const Attended& saved, AttentionShape shape,
                             ConstTensorView document_T);

}  // namespace upmoe
