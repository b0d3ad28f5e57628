#include "kernels/ops/noisy_routing.h"

#include "kernels/ops/check_tensor.h"
#include "kernels/ops/dispatch.h"

namespace upmoe::ops {

namespace {

void check_routed(const Exec& ex, const NoisyLogits& r,
                  std::source_location where = std::source_location::current()) {
  const Shape &TE = r.logits_TE.shape, &TK = r.index_TK.shape;
  if (TE.rank != 2 || TK.rank != 2 || TK[0] != TE[0] || TK[1] < 1 || TK[1] > TE[1])
    fail_check("1 <= K <= E", where, fmt::format("logits_TE {}, index_TK {}", TE.str(), TK.str()));
  check_tensor(ex, r.logits_TE, TE, DType::kF32, "logits_TE", where);
  check_tensor(ex, r.scale_TE, TE, DType::kF32, "scale_TE", where);
  check_tensor(ex, r.noisy_TE, TE, DType::kF32, "noisy_TE", where);
  check_tensor(ex, r.index_TK, TK, DType::kI32, "index_TK", where);
}

double elements_of(const ConstTensorView& t) {
  return static_cast<double>(t.elements());
}

}  // namespace

void add_router_noise(Exec& ex, TensorView noisy_TE, ConstTensorView logits_TE, ConstTensorView scale_TE,
                      const TokenDraws& draws) {
  UPMOE_CHECK(logits_TE.shape.rank == 2, "logits_TE {}", logits_TE.shape.str());
  check_tensor(ex, logits_TE, logits_TE.shape, DType::kF32, "logits_TE");
  check_tensor(ex, scale_TE, logits_TE.shape, DType::kF32, "scale_TE");
  check_tensor(ex, noisy_TE, logits_TE.shape, DType::kF32, "noisy_TE");
  check_tensor(ex, draws.place_T, {logits_TE.shape[0]}, DType::kI32, "place_T");
  ex.book("add_router_noise", 4 * elements_of(logits_TE), 2 * bytes_of(logits_TE) + bytes_of(draws.place_T),
          bytes_of(noisy_TE));
  dispatch(ex, &Backend::add_router_noise, noisy_TE, logits_TE, scale_TE, draws);
}

void noisy_load(Exec& ex, TensorView load_E, const NoisyLogits& routed) {
  check_scratch(ex);
  check_routed(ex, routed);
  check_tensor(ex, load_E, {routed.logits_TE.shape[1]}, DType::kF64, "load_E");
  ex.book("noisy_load", 4 * elements_of(routed.logits_TE),
          3 * bytes_of(routed.logits_TE) + bytes_of(routed.index_TK), bytes_of(load_E));
  dispatch(ex, &Backend::noisy_load, load_E, routed);
}

void add_router_noise_backward(Exec& ex, TensorView dlogits_TE, TensorView dscale_TE,
                               const NoisyGradient& gradient, const NoisyLogits& routed,
                               const TokenDraws& draws) {
  check_routed(ex, routed);
  const Shape& TE = routed.logits_TE.shape;
  check_tensor(ex, dlogits_TE, TE, DType::kF32, "dlogits_TE");
  check_tensor(ex, dscale_TE, TE, DType::kF32, "dscale_TE");
  check_tensor(ex, gradient.dnoisy_TE, TE, DType::kF32, "dnoisy_TE");
  if (gradient.dload_E.given()) check_tensor(ex, gradient.dload_E, {TE[1]}, DType::kF32, "dload_E");
  check_tensor(ex, draws.place_T, {TE[0]}, DType::kI32, "place_T");
  ex.book("add_router_noise_backward", 8 * elements_of(routed.logits_TE),
          4 * bytes_of(routed.logits_TE) + bytes_of(routed.index_TK) + bytes_of(draws.place_T),
          2 * bytes_of(dlogits_TE));
  dispatch(ex, &Backend::add_router_noise_backward, dlogits_TE, dscale_TE, gradient, routed, draws);
}

void sum_by_expert(Exec& ex, TensorView sum_E, ConstTensorView weight_TK, ConstTensorView index_TK) {
  check_scratch(ex);
  UPMOE_CHECK(index_TK.shape.rank == 2 && sum_E.shape.rank == 1, "index_TK {}, sum_E {}",
              index_TK.shape.str(), sum_E.shape.str());
  check_tensor(ex, weight_TK, index_TK.shape, DType::kF32, "weight_TK");
  check_tensor(ex, index_TK, index_TK.shape, DType::kI32, "index_TK");
  check_tensor(ex, sum_E, sum_E.shape, DType::kF64, "sum_E");
  ex.book("sum_by_expert", elements_of(weight_TK), bytes_of(weight_TK) + bytes_of(index_TK), bytes_of(sum_E));
  dispatch(ex, &Backend::sum_by_expert, sum_E, weight_TK, index_TK);
}

void add_by_expert(Exec& ex, TensorView out_TK, ConstTensorView dweight_TK, ConstTensorView dsum_E,
                   ConstTensorView index_TK) {
  UPMOE_CHECK(index_TK.shape.rank == 2 && dsum_E.shape.rank == 1, "index_TK {}, dsum_E {}",
              index_TK.shape.str(), dsum_E.shape.str());
  check_tensor(ex, dweight_TK, index_TK.shape, DType::kF32, "dweight_TK");
  check_tensor(ex, out_TK, index_TK.shape, DType::kF32, "out_TK");
  check_tensor(ex, index_TK, index_TK.shape, DType::kI32, "index_TK");
  check_tensor(ex, dsum_E, dsum_E.shape, DType::kF32, "dsum_E");
  ex.book("add_by_expert", elements_of(dweight_TK),
          bytes_of(dweight_TK) + bytes_of(index_TK) + bytes_of(dsum_E), bytes_of(out_TK));
  dispatch(ex, &Backend::add_by_expert, out_TK, dweight_TK, dsum_E, index_TK);
}

}  // namespace upmoe::ops
