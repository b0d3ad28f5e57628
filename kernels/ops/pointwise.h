#pragma once
// Elementwise work over whole tensors. fp32 and bf16.

#include <span>

#include "kernels/core/exec.h"

namespace upmoe::ops {

void fill(Exec& ex, TensorView x, float value);
void cast(Exec& ex, TensorView out, ConstTensorView in);  // copies where dtypes agree
// out_TM[:, out_begin + i] = in_TN[:, in_begin + i] for i < width, converting where the dtypes differ.
void copy_columns(Exec& ex, TensorView out_TM, std::int64_t out_begin, ConstTensorView in_TN,
                  std::int64_t in_begin, std::int64_t width);
void add(Exec& ex, TensorView out, ConstTensorView a, ConstTensorView b);  // out may alias a or b
void scale(Exec& ex, TensorView x, float factor);
// out = in, held within +-limit, which is more than 0. Not-a-numbers stay.
void clip(Exec& ex, TensorView out, ConstTensorView in, float limit);
// dx = 0 where `in` was beyond the limit, as torch.clamp's gradient is.
void clip_backward(Exec& ex, TensorView dx, ConstTensorView in, float limit);
// sum_1 (fp64) += sum of x^2 over all parts in fp64, in an order that does not depend on the number of
// threads. Parts may differ in dtype.
void sum_of_squares(Exec& ex, TensorView sum_1, std::span<const ConstTensorView> parts);
// Parts that are one tensor, in the call of an op.
inline std::span<const ConstTensorView> only(const ConstTensorView& x) {
  return {&x, 1};
}
// sum_1 (fp64) += sum of x (fp32) in fp64, likewise ordered.
void sum(Exec& ex, TensorView sum_1, ConstTensorView x);

}  // namespace upmoe::ops
