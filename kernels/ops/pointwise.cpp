#include "kernels/ops/pointwise.h"

#include "kernels/ops/check_tensor.h"
#include "kernels/ops/dispatch.h"

namespace upmoe::ops {

namespace {

double count_of(const ConstTensorView& t) {
  return static_cast<double>(t.elements());
}

}  // namespace

void fill(Exec& ex, TensorView x, float value) {
  check_float(x, "x");
  check_tensor(ex, x, x.shape, x.dtype, "x");
  ex.book("fill", 0, 0, bytes_of(x));
  dispatch(ex, &Backend::fill, x, value);
}

void cast(Exec& ex, TensorView out, ConstTensorView in) {
  if (out.dtype != in.dtype) {
    check_float(in, "in");
    check_float(out, "out");
  }
  check_tensor(ex, in, in.shape, in.dtype, "in");
  check_tensor(ex, out, in.shape, out.dtype, "out");
  ex.book("cast", 0, bytes_of(in), bytes_of(out));
  dispatch(ex, &Backend::cast, out, in);
}

void copy_columns(Exec& ex, TensorView out_TM, std::int64_t out_begin, ConstTensorView in_TN,
                  std::int64_t in_begin, std::int64_t width) {
  UPMOE_CHECK(out_TM.shape.rank == 2 && in_TN.shape.rank == 2 && out_TM.shape[0] == in_TN.shape[0],
              "out_TM {}, in_TN {}", out_TM.shape.str(), in_TN.shape.str());
  UPMOE_CHECK(width >= 0 && 0 <= out_begin && out_begin + width <= out_TM.shape[1] && 0 <= in_begin &&
                  in_begin + width <= in_TN.shape[1],
              "columns {} and {}, {} of them, of {} and {}", out_begin, in_begin, width, out_TM.shape.str(),
              in_TN.shape.str());
  check_float(out_TM, "out_TM");
  check_float(in_TN, "in_TN");
  check_tensor(ex, out_TM, out_TM.shape, out_TM.dtype, "out_TM");
  check_tensor(ex, in_TN, in_TN.shape, in_TN.dtype, "in_TN");
  const double elements = static_cast<double>(out_TM.shape[0] * width);
  ex.book("copy_columns", 0, elements * static_cast<double>(size_of(in_TN.dtype)),
          elements * static_cast<double>(size_of(out_TM.dtype)));
  dispatch(ex, &Backend::copy_columns, out_TM, out_begin, in_TN, in_begin, width);
}

void add(Exec& ex, TensorView out, ConstTensorView a, ConstTensorView b) {
  check_float(a, "a");
  check_tensor(ex, a, a.shape, a.dtype, "a");
  check_tensor(ex, b, a.shape, a.dtype, "b");
  check_tensor(ex, out, a.shape, a.dtype, "out");
  ex.book("add", count_of(a), bytes_of(a) + bytes_of(b), bytes_of(out));
  dispatch(ex, &Backend::add, out, a, b);
}

void scale(Exec& ex, TensorView x, float factor) {
  check_float(x, "x");
  check_tensor(ex, x, x.shape, x.dtype, "x");
  ex.book("scale", count_of(x), bytes_of(x), bytes_of(x));
  dispatch(ex, &Backend::scale, x, factor);
}

void clip(Exec& ex, TensorView out, ConstTensorView in, float limit) {
  UPMOE_CHECK(limit > 0, "clipped to {}", limit);
  check_float(in, "in");
  check_tensor(ex, in, in.shape, in.dtype, "in");
  check_tensor(ex, out, in.shape, in.dtype, "out");
  ex.book("clip", count_of(in), bytes_of(in), bytes_of(out));
  dispatch(ex, &Backend::clip, out, in, limit);
}

void clip_backward(Exec& ex, TensorView dx, ConstTensorView in, float limit) {
  check_float(dx, "dx");
  check_tensor(ex, dx, dx.shape, dx.dtype, "dx");
  check_tensor(ex, in, dx.shape, dx.dtype, "in");
  ex.book("clip_backward", count_of(dx), 2 * bytes_of(dx), bytes_of(dx));
  dispatch(ex, &Backend::clip_backward, dx, in, limit);
}

void sum_of_squares(Exec& ex, TensorView sum_1, std::span<const ConstTensorView> parts) {
  check_scratch(ex);
  check_tensor(ex, sum_1, {1}, DType::kF64, "sum_1");
  double elements = 0, bytes = 0;
  for (const ConstTensorView& x : parts) {
    check_float(x, "x");
    check_tensor(ex, x, x.shape, x.dtype, "x");
    elements += count_of(x);
    bytes += bytes_of(x);
  }
  ex.book("sum_of_squares", 2 * elements, bytes + bytes_of(sum_1), bytes_of(sum_1));
  dispatch(ex, &Backend::sum_of_squares, sum_1, parts);
}

void sum(Exec& ex, TensorView sum_1, ConstTensorView x) {
  check_scratch(ex);
  check_tensor(ex, x, x.shape, DType::kF32, "x");
  check_tensor(ex, sum_1, {1}, DType::kF64, "sum_1");
  ex.book("sum", count_of(x), bytes_of(x) + bytes_of(sum_1), bytes_of(sum_1));
  dispatch(ex, &Backend::sum, sum_1, x);
}

}  // namespace upmoe::ops
