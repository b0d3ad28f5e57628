#include "kernels/ops/adamw8bit.h"

#include "kernels/ops/check_tensor.h"
#include "kernels/ops/dispatch.h"
#include "kernels/ops/moment_codes.h"

namespace upmoe {

std::int64_t moment_blocks(std::int64_t first, std::int64_t n) {
  return n == 0 ? 0 : (first + n - 1) / kMomentBlock - first / kMomentBlock + 1;
}

}  // namespace upmoe

namespace upmoe::ops {

namespace {

double check_moments(const Exec& ex, const CodedMoments& moments, const Shape& shape) {
  UPMOE_CHECK(shape.rank == 1, "expected a flat tensor, found {}", shape.str());
  UPMOE_CHECK(moments.first >= 0, "element {}", moments.first);
  const Shape blocks{moment_blocks(moments.first, shape[0])};
  check_tensor(ex, moments.m_n, shape, DType::kU8, "m_n");
  check_tensor(ex, moments.v_n, shape, DType::kU8, "v_n");
  check_tensor(ex, moments.m_scale_b, blocks, DType::kF32, "m_scale_b");
  check_tensor(ex, moments.v_scale_b, blocks, DType::kF32, "v_scale_b");
  return 2 * (bytes_of(moments.m_n) + bytes_of(moments.m_scale_b));
}

}  // namespace

void adamw8bit(Exec& ex, TensorView weight, const CodedMoments& moments, ConstTensorView grad,
               const AdamWStep& step, const Chance& chance) {
  const double state = check_moments(ex, moments, grad.shape);
  UPMOE_CHECK(step.step >= 1, "steps count from 1, found {}", step.step);
  check_float(grad, "grad");
  check_float(weight, "weight");
  check_tensor(ex, grad, grad.shape, grad.dtype, "grad");
  check_tensor(ex, weight, grad.shape, weight.dtype, "weight");
  ex.book("adamw8bit", 14.0 * static_cast<double>(grad.elements()), state + bytes_of(weight) + bytes_of(grad),
          state + bytes_of(weight));
  dispatch(ex, &Backend::adamw8bit, weight, moments, grad, step, chance);
}

void encode_moments(Exec& ex, const CodedMoments& moments, ConstTensorView m_n, ConstTensorView v_n) {
  const double state = check_moments(ex, moments, m_n.shape);
  check_tensor(ex, m_n, m_n.shape, DType::kF32, "m_n");
  check_tensor(ex, v_n, m_n.shape, DType::kF32, "v_n");
  ex.book("encode_moments", 0, 2 * bytes_of(m_n), state);
  dispatch(ex, &Backend::encode_moments, moments, m_n, v_n);
}

void decode_moments(Exec& ex, TensorView m_n, TensorView v_n, const CodedMoments& moments) {
  const double state = check_moments(ex, moments, m_n.shape);
  check_tensor(ex, m_n, m_n.shape, DType::kF32, "m_n");
  check_tensor(ex, v_n, m_n.shape, DType::kF32, "v_n");
  ex.book("decode_moments", 0, state, 2 * bytes_of(m_n));
  dispatch(ex, &Backend::decode_moments, m_n, v_n, moments);
}

}  // namespace upmoe::ops
