#include "upcycle/neuron_activity.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "kernels/ops/gemm.h"
#include "parallel/threads.h"

namespace upmoe {
namespace {

constexpr std::int64_t kRows = 256;  // of tokens and of neurons, at a time
constexpr std::size_t kAddressSpace = std::size_t{1} << 34;

// To length 1; a row of zeros stays.
void to_unit_length(float* row, std::int64_t count) {
  double square = 0;
  for (std::int64_t i = 0; i < count; ++i) square += static_cast<double>(row[i]) * row[i];
  if (square == 0) return;
  const auto inverse = static_cast<float>(1 / std::sqrt(square));
  for (std::int64_t i = 0; i < count; ++i) row[i] *= inverse;
}

// Row `row` of gate or up as fp32, of length 1.
void unit_row(const SourceFfn& ffn, FfnMatrix matrix, DType dtype, std::int64_t row, float* out) {
  read_rows(ffn, matrix, dtype, row, row + 1, ffn.model_width, out);
  to_unit_length(out, ffn.model_width);
}

// h_tF = silu(x_tD g_FD^T) * (x_tD u_FD^T), some neurons at a time.
void activities(Exec& ex, const SourceFfn& ffn, DType dtype, ConstTensorView x_tD, float* h_tF) {
  const std::int64_t t = x_tD.shape[0], D = x_tD.shape[1], F = ffn.width;
  for (std::int64_t begin = 0; begin < F; begin += kRows) {
    ScratchScope scope(*ex.scratch);
    const std::int64_t n = std::min(kRows, F - begin);
    const auto take = [&](Shape shape) { return ex.scratch->take(shape, DType::kF32, "activity"); };
    const TensorView w_nD = take({n, D}), gate_tn = take({t, n}), up_tn = take({t, n});
    for (const auto& [matrix, out] : {std::pair{FfnMatrix::kGate, gate_tn}, {FfnMatrix::kUp, up_tn}}) {
      for (std::int64_t r = 0; r < n; ++r) unit_row(ffn, matrix, dtype, begin + r, w_nD.as<float>() + r * D);
      ops::gemm(ex, out, {x_tD}, {w_nD, Transpose::kYes}, Accumulate::kOverwrite);
    }
    for (std::int64_t i = 0; i < t; ++i)
      for (std::int64_t j = 0; j < n; ++j) {
        const float g = gate_tn.as<float>()[i * n + j], u = up_tn.as<float>()[i * n + j];
        h_tF[i * F + begin + j] = g / (1 + std::exp(-g)) * u;
      }
  }
}

}  // namespace

ActiveNeurons active_neurons(const SourceFfn& ffn, DType dtype, const std::vector<float>& x_TD,
                             std::int64_t per_token) {
  const std::int64_t D = ffn.model_width, F = ffn.width, T = static_cast<std::int64_t>(x_TD.size()) / D;
  UPMOE_CHECK(static_cast<std::int64_t>(x_TD.size()) == T * D && per_token >= 1 && per_token <= F,
              "{} of {} neurons over {} values", per_token, F, x_TD.size());
  const ComputesAlone alone;
  Arena scratch(Device{}, kAddressSpace, "activity");
  Exec ex;
  ex.scratch = &scratch;
  ActiveNeurons active{F, per_token, {}};
  std::vector<float> x_tD, h_tF;
  std::vector<std::int32_t> order(static_cast<std::size_t>(F));
  for (std::int64_t begin = 0; begin < T; begin += kRows) {
    const std::int64_t t = std::min(kRows, T - begin);
    x_tD.assign(x_TD.begin() + begin * D, x_TD.begin() + (begin + t) * D);
    for (std::int64_t i = 0; i < t; ++i) to_unit_length(x_tD.data() + i * D, D);
    h_tF.resize(static_cast<std::size_t>(t * F));
    activities(ex, ffn, dtype, host_view(static_cast<const float*>(x_tD.data()), {t, D}), h_tF.data());
    for (std::int64_t i = 0; i < t; ++i) {
      const float* h_F = h_tF.data() + i * F;
      std::iota(order.begin(), order.end(), 0);
      std::partial_sort(order.begin(), order.begin() + per_token, order.end(),
                        [&](std::int32_t a, std::int32_t b) {
                          const float x = std::abs(h_F[a]), y = std::abs(h_F[b]);
                          return x > y || (x == y && a < b);
                        });
      active.lists.insert(active.lists.end(), order.begin(), order.begin() + per_token);
    }
  }
  return active;
}

Calibration::Layer clustered_layer(const UpcycleConfig& config, const SourceFfn& ffn, DType dtype,
                                   const std::vector<float>& x_TD) {
  const std::int64_t shared =
      config.shared.method == SharedMethod::kActive ? config.target.shared_expert_intermediate_size : 0;
  Clusters clusters = cluster_neurons(active_neurons(ffn, dtype, x_TD, config.experts.cluster_markers),
                                      shared, config.target.num_experts);
  Calibration::Layer layer;
  if (config.router.method == RouterMethod::kNeurons) {
    layer.router_ED.resize(clusters.representatives.size() * static_cast<std::size_t>(ffn.model_width));
    float* row = layer.router_ED.data();
    for (const std::int32_t neuron : clusters.representatives) {
      unit_row(ffn, FfnMatrix::kGate, dtype, neuron, row);
      row += ffn.model_width;
    }
  }
  layer.order = std::move(clusters.order);
  return layer;
}

}  // namespace upmoe
