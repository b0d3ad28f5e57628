#pragma once
// Sums of several ranks' values in rank order, on the host: what makes a result independent of the transport.

#include <span>

#include "kernels/core/reduce_op.h"
#include "kernels/core/tensor.h"

namespace upmoe {

// out[i] = parts[0][i] op parts[1][i] op ..., bf16 in fp32 and rounded once. Each part has `elements` values;
// out may be one of the parts.
void reduce_in_order(DType dtype, ReduceOp op, std::byte* out, std::span<const std::byte* const> parts,
                     std::int64_t elements);

}  // namespace upmoe
