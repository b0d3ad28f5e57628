// The experts' fused kernels: what they need to know of the rows, and which of them computes an op.

#include "kernels/ops/experts.h"

#include "kernels/core/log.h"
#include "kernels/cuda/choose/chosen.h"
#include "kernels/cuda/choose/expert_ffn.h"
#include "kernels/cuda/choose/expert_variant.h"
#include "kernels/cuda/gpu_of.cuh"
#include "kernels/cuda/portable/expert_index.h"
#include "kernels/cuda/sm90/experts.cuh"
#include "kernels/ops/backend.h"

namespace upmoe::cuda {

namespace {

// What a rehearsal without a GPU counts as fused is what the kernels take, neither more nor less.
static_assert(ops::kExpertColumns == sm90::kWidthTile);
static_assert(ops::kExpertNeurons == sm90::kNeuronTile);
static_assert(ops::kMostFusedExperts == sm90::kMostExperts);

int size_of_dim(std::int64_t n) {
  UPMOE_CHECK(n <= std::numeric_limits<std::int32_t>::max(), "{} rows or columns", n);
  return static_cast<int>(n);
}

// Of `total` rows, `width` and `neurons` as an expert has them.
sm90::ExpertsLaunch launch_of(const Exec& ex, ExpertKernel kernel, const ExpertRows& rows, std::int64_t total,
                              std::int64_t width, std::int64_t neurons) {
  const CudaStream& stream = stream_of(ex);
  UPMOE_CHECK(stream.sm() == 90,
              "the experts' fused kernels on compute capability {}: fuses_experts() says no", stream.sm());
  return {
      stream.raw(),
      stream.multiprocessors(),
      rows.offset_e1.as<std::int32_t>(),
      size_of_dim(rows.experts()),
      size_of_dim(total),
      chosen(ExpertVariantDescription{{kernel, rows.experts(), width, neurons, total}, ex.expert_variants},
             gpu_of(ex))};
}

// bf16 alone, where the copy engine can fetch it.
template <class View>
auto bf16_of(const View& t) {
  UPMOE_CHECK(t.dtype == DType::kBF16 && reinterpret_cast<std::uintptr_t>(t.data) % 16 == 0,
              "{} {} at an address of {} bytes for the experts' fused kernels", name_of(t.dtype),
              t.shape.str(), reinterpret_cast<std::uintptr_t>(t.data) % 16);
  return t.template as<bf16>();
}

// In temporary memory of the caller's scope.
const int* tokens_of(Exec& ex, const ops::PickedRows& rows, std::int64_t total) {
  // Threads count what they gather in 32 bits, in units of 16 bytes.
  UPMOE_CHECK(rows.from_XD.bytes() <= std::size_t{16} << 32,
              "rows of {} bytes for the experts' fused kernels, which gather from {} at the most",
              rows.from_XD.bytes(), std::size_t{16} << 32);
  const TensorView token_R = ex.scratch->take({total}, DType::kI32, "tokens of expert rows");
  row_tokens(ex, token_R, rows.index_R, rows.divisor);
  return token_R.as<std::int32_t>();
}

}  // namespace

bool fuses_experts(const Exec& ex, const ops::ExpertShape& shape) {
  const ExpertFfnChoice choice = chosen(ExpertFfnDescription{ex.experts, shape}, gpu_of(ex));
  if (!choice.reason.empty()) log::warn_once("{}", choice.reason);
  return choice.fused;
}

void experts_up(Exec& ex, TensorView gate_up_RG, TensorView h_RF, const ops::PickedRows& x,
                const ops::ExpertFfn& f) {
  const std::int64_t R = h_RF.shape[0], D = f.gate_up_eGD.shape[2], F = h_RF.shape[1];
  if (R == 0) return;
  ScratchScope scope(*ex.scratch);
  sm90::experts_up(launch_of(ex, ExpertKernel::kUp, f.rows, R, D, F), bf16_of(gate_up_RG), bf16_of(h_RF),
                   {.x_TD = bf16_of(x.from_XD),
                    .w_eGD = bf16_of(f.gate_up_eGD),
                    .token_R = tokens_of(ex, x, R),
                    .weight_R = f.weight_R.as<float>(),
                    .width = size_of_dim(D),
                    .neurons = size_of_dim(F)});
}

void experts_rows(Exec& ex, TensorView out_RN, ConstTensorView in_RK, ConstTensorView w,
                  Transpose transpose_w, const ExpertRows& rows) {
  if (in_RK.shape[0] == 0) return;
  const bool down = transpose_w == Transpose::kYes;  // else its gradient's way back, of gates and ups
  const std::int64_t R = in_RK.shape[0], K = in_RK.shape[1], N = out_RN.shape[1];
  const ExpertKernel kernel = down ? ExpertKernel::kDown : ExpertKernel::kDx;
  sm90::experts_rows(launch_of(ex, kernel, rows, R, N, down ? K : K / 2), bf16_of(out_RN),
                     {.in = bf16_of(in_RK),
                      .w = bf16_of(w),
                      .inner = size_of_dim(K),
                      .columns = size_of_dim(N),
                      .transposed = down});
}

void experts_dhidden(Exec& ex, const ops::HiddenGradients& g, const ops::PickedRows& dy,
                     ConstTensorView gate_up_RG, const ops::ExpertFfn& f) {
  const std::int64_t R = gate_up_RG.shape[0], D = f.down_eDF.shape[1], F = g.h_RF.shape[1];
  if (R == 0) return;
  ScratchScope scope(*ex.scratch);
  // A part of a row's sum comes from every 128 neurons' tile.
  const TensorView parts_RP =
      ex.scratch->take({R, F / sm90::kDWeightNeurons}, DType::kF32, "parts of expert row weight gradients");
  sm90::experts_dhidden(
      launch_of(ex, ExpertKernel::kDHidden, f.rows, R, D, F),
      {.dgate_up_RG = bf16_of(g.dgate_up_RG), .h_RF = bf16_of(g.h_RF), .dweight_RP = parts_RP.as<float>()},
      {.dy_TD = bf16_of(dy.from_XD),
       .gate_up_RG = bf16_of(gate_up_RG),
       .w_eDF = bf16_of(f.down_eDF),
       .token_R = tokens_of(ex, dy, R),
       .weight_R = f.weight_R.as<float>(),
       .width = size_of_dim(D),
       .neurons = size_of_dim(F)});
  sum_parts(ex, g.dweight_R, parts_RP);
}

void experts_wgrad(Exec& ex, TensorView dw_eNK, const ops::PickedRows& dy, const ops::PickedRows& x,
                   const ExpertRows& rows, Accumulate mode) {
  // The kernel gathers one side; where that is dy, it makes the transpose.
  const bool transposed = dy.index_R.given();
  const ops::PickedRows &gathered = transposed ? dy : x, &plain = transposed ? x : dy;
  const std::int64_t R = plain.from_XD.shape[0], D = gathered.from_XD.shape[1], Y = plain.from_XD.shape[1];
  if (R == 0) {
    if (mode == Accumulate::kOverwrite)
      check(cudaMemsetAsync(dw_eNK.data, 0, dw_eNK.bytes(), stream_of(ex).raw()));
    return;
  }
  ScratchScope scope(*ex.scratch);
  const TensorView ranking_e = ex.scratch->take({rows.experts()}, DType::kI32, "experts by rows");
  rank_experts(ex, ranking_e, rows.offset_e1);
  const ExpertKernel kernel = transposed ? ExpertKernel::kDwDown : ExpertKernel::kDwGateUp;
  sm90::experts_dweights(launch_of(ex, kernel, rows, R, D, transposed ? Y : Y / 2), bf16_of(dw_eNK),
                         {.y_RY = bf16_of(plain.from_XD),
                          .x_TX = bf16_of(gathered.from_XD),
                          .token_R = tokens_of(ex, gathered, R),
                          .ranking_e = ranking_e.as<std::int32_t>(),
                          .columns_y = size_of_dim(Y),
                          .columns_x = size_of_dim(D),
                          .transposed = transposed,
                          .add = mode == Accumulate::kAdd});
}

}  // namespace upmoe::cuda
