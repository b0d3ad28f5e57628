#include "upcycle/layer_error.h"

#include <algorithm>
#include <cmath>

#include "kernels/core/normal_batch.h"
#include "kernels/core/philox.h"
#include "kernels/ops/activation.h"
#include "kernels/ops/gemm.h"
#include "kernels/ops/norm.h"
#include "kernels/ops/pointwise.h"
#include "kernels/ops/sigmoid_routing.h"
#include "parallel/threads.h"

namespace upmoe {
namespace {

constexpr std::int64_t kRows = 256;  // of a matrix, made at a time
constexpr std::size_t kAddressSpace = std::size_t{1} << 34;

// Rows [begin, end) of a matrix as fp32, the first at `out`, each `stride` behind the one before.
using ReadRows = std::function<void(std::int64_t begin, std::int64_t end, std::int64_t stride, float* out)>;

ReadRows rows_of(const RecipeLine& line, const FillContext& context) {
  return [&](std::int64_t begin, std::int64_t end, std::int64_t stride, float* out) {
    const DType dtype = context.source.dtype();
    const std::size_t row = static_cast<std::size_t>(line.columns()) * size_of(dtype);
    std::vector<std::byte> bytes(static_cast<std::size_t>(end - begin) * row);
    fill(line, begin, end, context, bytes);
    for (std::int64_t r = 0; r < end - begin; ++r)
      to_floats(bytes.data() + static_cast<std::size_t>(r) * row, dtype, line.columns(), out + r * stride);
  };
}

ReadRows rows_of(const SourceFfn& ffn, FfnMatrix matrix, DType dtype) {
  return [&ffn, matrix, dtype](std::int64_t begin, std::int64_t end, std::int64_t stride, float* out) {
    read_rows(ffn, matrix, dtype, begin, end, stride, out);
  };
}

TensorView take(Exec& ex, Shape shape, DType dtype = DType::kF32) {
  return ex.scratch->take(shape, dtype, "layer error");
}

// y_TN = x_TK w_NK^T.
void product(Exec& ex, TensorView y_TN, ConstTensorView x_TK, const ReadRows& w_NK) {
  const std::int64_t T = x_TK.shape[0], K = x_TK.shape[1], N = y_TN.shape[1];
  for (std::int64_t begin = 0; begin < N; begin += kRows) {
    ScratchScope scope(*ex.scratch);
    const std::int64_t n = std::min(kRows, N - begin);
    const TensorView w_nK = take(ex, {n, K}), y_Tn = take(ex, {T, n});
    w_NK(begin, begin + n, K, w_nK.as<float>());
    ops::gemm(ex, y_Tn, {x_TK}, {w_nK, Transpose::kYes}, Accumulate::kOverwrite);
    ops::copy_columns(ex, y_TN, begin, y_Tn, 0, n);
  }
}

struct Ffn {
  ReadRows gate, up, down;
  std::int64_t width;
};

// y = down(silu(gate x) * up x * weight): the weight of a routed expert or of the shared expert's gate.
void ffn_forward(Exec& ex, TensorView y_TD, ConstTensorView x_TD, const Ffn& ffn, ConstTensorView weight_T) {
  const std::int64_t T = x_TD.shape[0], D = x_TD.shape[1];
  ScratchScope scope(*ex.scratch);
  const TensorView h_TF = take(ex, {T, ffn.width});
  for (std::int64_t begin = 0; begin < ffn.width; begin += kRows) {
    ScratchScope block(*ex.scratch);
    const std::int64_t n = std::min(kRows, ffn.width - begin);
    const TensorView w_GD = take(ex, {2 * n, D}), gate_up_TG = take(ex, {T, 2 * n}), h_Tn = take(ex, {T, n});
    ffn.gate(begin, begin + n, 2 * D, w_GD.as<float>());
    // Gate and up row in turns, as swiglu_forward wants them: stride 2 D, the up rows one row further.
    ffn.up(begin, begin + n, 2 * D, w_GD.as<float>() + D);
    ops::gemm(ex, gate_up_TG, {x_TD}, {w_GD, Transpose::kYes}, Accumulate::kOverwrite);
    ops::swiglu_forward(ex, h_Tn, gate_up_TG, weight_T);
    ops::copy_columns(ex, h_TF, begin, h_Tn, 0, n);
  }
  product(ex, y_TD, h_TF, ffn.down);
}

// One layer as the recipe makes it.
struct Layer {
  const Recipe& recipe;
  const Recipe::Layer& lines;
  const ModelConfig& moe;
  const FillContext& context;

  const RecipeLine& line(int index) const { return recipe.lines[static_cast<std::size_t>(index)]; }
  Ffn ffn(const std::array<int, 3>& of) const {
    const auto at = [&](FfnMatrix m) -> const RecipeLine& { return line(of[static_cast<std::size_t>(m)]); };
    return {rows_of(at(FfnMatrix::kGate), context), rows_of(at(FfnMatrix::kUp), context),
            rows_of(at(FfnMatrix::kDown), context), at(FfnMatrix::kGate).rows()};
  }
  void route(Exec& ex, const SigmoidRoutes& out, ConstTensorView logits_TE) const;
  void routed_forward(Exec& ex, TensorView y_TD, ConstTensorView x_TD) const;
  void add_shared(Exec& ex, TensorView y_TD, ConstTensorView x_TD) const;
  void forward(Exec& ex, TensorView y_TD, ConstTensorView x_TD) const {
    routed_forward(ex, y_TD, x_TD);
    add_shared(ex, y_TD, x_TD);
  }
};

// By the biases that a new mixture has: zeros.
void Layer::route(Exec& ex, const SigmoidRoutes& out, ConstTensorView logits_TE) const {
  const RouterForm& form = moe.router;
  const auto scale = static_cast<float>(form.scale);
  switch (form.score) {
    case RouterScore::kSoftmax:
      ops::route_tokens(ex, out.probs_TE, out.index_TK, out.weight_TK, out.lse_T, logits_TE,
                        moe.norm_topk_prob);
      return ops::scale(ex, out.weight_TK, scale);
    case RouterScore::kSigmoid:
      return ops::route_sigmoid(ex, out, logits_TE, {},
                                {form.groups, form.group_topk, moe.norm_topk_prob, scale});
  }
}

// Only the experts that the router picks are made.
void Layer::routed_forward(Exec& ex, TensorView y_TD, ConstTensorView x_TD) const {
  const std::int64_t T = x_TD.shape[0], D = x_TD.shape[1], E = moe.num_experts, K = moe.num_experts_per_tok,
                     N = T * K;
  const TensorView logits_TE = take(ex, {T, E}), probs_TE = take(ex, {T, E}), lse_T = take(ex, {T}),
                   weight_TK = take(ex, {T, K}), index_TK = take(ex, {T, K}, DType::kI32);
  product(ex, logits_TE, x_TD, rows_of(line(lines.router), context));
  route(ex, {probs_TE, index_TK, weight_TK, lse_T}, logits_TE);

  const TensorView order_N = take(ex, {N}, DType::kI32), slot_TK = take(ex, {T, K}, DType::kI32),
                   counts_E = take(ex, {E}, DType::kI32), x_ND = take(ex, {N, D}), y_ND = take(ex, {N, D}),
                   weight_N1 = take(ex, {N, 1});
  ops::sort_by_expert(ex, order_N, slot_TK, counts_E, index_TK);
  ops::gather_rows(ex, x_ND, x_TD, order_N, K);
  ops::gather_rows(ex, weight_N1, weight_TK.reshape({N, 1}), order_N, 1);
  // Expert by expert, made as they are needed: the layer's experts never are in memory together.
  std::int64_t begin = 0;
  for (std::int64_t e = 0; e < E; ++e) {
    const std::int64_t n = counts_E.as<std::int32_t>()[e];
    if (n == 0) continue;
    const ConstTensorView weight_n = weight_N1.rows(begin, begin + n).reshape({n});
    ffn_forward(ex, y_ND.rows(begin, begin + n), x_ND.rows(begin, begin + n),
                ffn(lines.experts[static_cast<std::size_t>(e)]), weight_n);
    begin += n;
  }
  ops::gather_sum_rows(ex, y_TD, y_ND, slot_TK);
}

void Layer::add_shared(Exec& ex, TensorView y_TD, ConstTensorView x_TD) const {
  const std::int64_t T = x_TD.shape[0], D = x_TD.shape[1];
  if (lines.shared[0] < 0 || (moe.shared_expert_gate && lines.shared_gate < 0)) return;
  const TensorView shared_TD = take(ex, {T, D}), gate_T = take(ex, {T}), w_1D = take(ex, {1, D});
  ConstTensorView weight_T;
  if (moe.shared_expert_gate) {
    rows_of(line(lines.shared_gate), context)(0, 1, D, w_1D.as<float>());
    ops::sigmoid_gate_forward(ex, gate_T, x_TD, w_1D);
    weight_T = gate_T;
  }
  ffn_forward(ex, shared_TD, x_TD, ffn(lines.shared), weight_T);
  ops::add(ex, y_TD, y_TD, shared_TD);
}

// Inputs as the layer's FFN meets them.
TensorView make_inputs(Exec& ex, int layer, std::int64_t tokens, const FillContext& context) {
  const ModelConfig& dense = context.source.model().config();
  const std::int64_t D = dense.hidden_size;
  const TensorView z_TD = take(ex, {tokens, D}), x_TD = take(ex, {tokens, D}), rstd_T = take(ex, {tokens}),
                   w_D = take(ex, {D});
  normal_batch(philox_key(context.seed, fmt::format("layers.{}.layer_error", layer)), 0, z_TD.elements(),
               z_TD.as<float>());
  std::vector<std::byte> bytes(static_cast<std::size_t>(D) * size_of(context.source.dtype()));
  context.source.read(tensor_name(dense, Role::kNorm2, layer), 0, bytes);
  to_floats(bytes.data(), context.source.dtype(), D, w_D.as<float>());
  ops::rms_norm_forward(ex, x_TD, rstd_T, z_TD, {w_D, 0.0f});
  return x_TD;
}

double relative_distance(const TensorView& found, const TensorView& expected) {
  double difference = 0, norm = 0;
  for (std::int64_t i = 0; i < found.elements(); ++i) {
    const double f = found.as<float>()[i], e = expected.as<float>()[i];
    difference += (f - e) * (f - e);
    norm += e * e;
  }
  return norm > 0 ? std::sqrt(difference / norm) : std::sqrt(difference);
}

}  // namespace

double growth_error(const Recipe& recipe, const Recipe& origin, int layer, const ModelConfig& moe,
                    const FillContext& context, int tokens) {
  const ComputesAlone alone;  // as in layer_error
  Arena scratch(Device{}, kAddressSpace, "layer error");
  Exec ex;
  ex.scratch = &scratch;
  const auto at = static_cast<std::size_t>(layer);
  const TensorView x_TD = make_inputs(ex, layer, tokens, context);
  const TensorView expected_TD = take(ex, x_TD.shape), y_TD = take(ex, x_TD.shape);
  Layer{origin, origin.layers[at], context.source.model().config(), context}.forward(ex, expected_TD, x_TD);
  Layer{recipe, recipe.layers[at], moe, context}.forward(ex, y_TD, x_TD);
  return relative_distance(y_TD, expected_TD);
}

double layer_error(const Recipe& recipe, int layer, const ModelConfig& moe, const FillContext& context,
                   int tokens) {
  const ComputesAlone alone;  // layers are shared out among threads, and their number must not change a sum
  Arena scratch(Device{}, kAddressSpace, "layer error");
  Exec ex;
  ex.scratch = &scratch;
  const std::shared_ptr<const SourceFfn> ffn = context.source.ffn(layer);
  const DType dtype = context.source.dtype();
  const TensorView x_TD = make_inputs(ex, layer, tokens, context);
  const TensorView expected_TD = take(ex, x_TD.shape), y_TD = take(ex, x_TD.shape);
  ffn_forward(ex, expected_TD, x_TD,
              {rows_of(*ffn, FfnMatrix::kGate, dtype), rows_of(*ffn, FfnMatrix::kUp, dtype),
               rows_of(*ffn, FfnMatrix::kDown, dtype), ffn->width},
              {});
  Layer{recipe, recipe.layers[static_cast<std::size_t>(layer)], moe, context}.forward(ex, y_TD, x_TD);
  return relative_distance(y_TD, expected_TD);
}

}  // namespace upmoe
