#pragma once
// Sums of several ranks' values in rank order, on the host: what makes a result independent of the transport.

#include <span>

#include "kernels/core/tensor.h"
#include "parallel/communicator.h"

namespace upmoe {

// out[i] = parts[0][i] op parts[1][i] op ..., bf16 in fp32 and rounded once. Each part has `elements` values;
// out may be one of the parts.
void reduce_in_order(DType dtype, ReduceOp op, std::byte* out, std::span<const std::byte* const> parts,
                     std::int64_t elements);

// The checks that every transport makes at the door.
void check_reduce_scatter(const Communicator& comm, const TensorView& out, const ConstTensorView& in);
void check_all_gather(const Communicator& comm, const TensorView& out, const ConstTensorView& in);
void check_all_to_all_rows(const Communicator& comm, const TensorView& out,
                           std::span<const std::int64_t> recv_rows, const ConstTensorView& in,
                           std::span<const std::int64_t> send_rows);
void check_peer(const Communicator& comm, int peer);     // of send and recv
std::size_t row_bytes(const Shape& shape, DType dtype);  // of one row of the first dim

}  // namespace upmoe
