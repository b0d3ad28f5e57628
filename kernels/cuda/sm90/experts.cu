#include "kernels/cuda/sm90/experts.cuh"

#include "kernels/cuda/sm90/cluster_launch.cuh"
#include "kernels/cuda/sm90/experts_dhidden.cuh"
#include "kernels/cuda/sm90/experts_down.cuh"
#include "kernels/cuda/sm90/experts_dweights.cuh"
#include "kernels/cuda/sm90/experts_up.cuh"

namespace upmoe::cuda::sm90 {

namespace {

constexpr int kPair = 2, kTileColumns = 256;

template <class Shared, int kBlocks = kPair>
ClusterLaunch clusters(const ExpertsLaunch& l) {
  return {l.stream, l.multiprocessors / kBlocks * kBlocks, kBlockThreads, kBlocks, sizeof(Shared)};
}

Routing routing(const ExpertsLaunch& l, const int* token_R) {
  return {token_R, l.offset_e1, l.experts};
}

template <Major kWeights>
void launch_rows(const ExpertsLaunch& l, bf16* out, const RowsOperands& o) {
  using C = RowsConfig<kWeights, kPair, 4>;  // columns: D; inner: F or 2F
  static_assert(kWidthTile % C::kColumns == 0 && kNeuronTile % kStepK == 0);
  launch_clusters(clusters<RowsShared<C>>(l), experts_rows_kernel<C>, rows_map(o.in, l.rows, o.inner),
                  rows_weights_map<C>(o.w, l.experts, o.columns, o.inner),
                  RowsProduct{out, l.offset_e1, l.experts, o.inner, o.columns});
}

template <bool kTransposed, bool kAdd, int kBlocks>
void launch_dweights(const ExpertsLaunch& l, bf16* dw, const DWeightsOperands& o) {
  using C = DWeightsConfig<kTransposed, kAdd, kBlocks, 4>;  // columns_y: F or 2F; columns_x: D
  static_assert(kNeuronTile % C::kRowsY == 0 && kWidthTile % C::kColumnsX == 0);
  static_assert(kTileColumns == C::kColumnsX);
  launch_clusters(clusters<DWeightsShared<C>, kBlocks>(l), experts_dweights_kernel<C>,
                  gradient_rows_map(o.y_RY, l.rows, o.columns_y),
                  WeightsGradient{o.x_TX, dw, o.ranking_e, routing(l, o.token_R), o.columns_y, o.columns_x});
}

// A pair's blocks have a column of tiles each.
template <bool kTransposed, bool kAdd>
void launch_dweights(const ExpertsLaunch& l, bf16* dw, const DWeightsOperands& o) {
  if (o.columns_x % (kPair * kTileColumns) == 0)
    launch_dweights<kTransposed, kAdd, kPair>(l, dw, o);
  else
    launch_dweights<kTransposed, kAdd, 1>(l, dw, o);
}

}  // namespace

void experts_up(const ExpertsLaunch& l, bf16* gate_up_RG, bf16* h_RF, const UpOperands& o) {
  using C = UpConfig<kPair, 4>;
  static_assert(kNeuronTile % C::kNeurons == 0 && kWidthTile % kStepK == 0);
  launch_clusters(clusters<UpShared<C>>(l), experts_up_kernel<C>,
                  up_weights_map<C>(o.w_eGD, l.experts, o.neurons, o.width),
                  UpProduct{o.x_TD, o.weight_R, gate_up_RG, h_RF, routing(l, o.token_R), o.width, o.neurons});
}

void experts_rows(const ExpertsLaunch& l, bf16* out, const RowsOperands& o) {
  o.transposed ? launch_rows<Major::kK>(l, out, o) : launch_rows<Major::kMN>(l, out, o);
}

void experts_dhidden(const ExpertsLaunch& l, const DHiddenResults& r, const DHiddenOperands& o) {
  using C = DHiddenConfig<kPair, 5>;
  static_assert(C::kNeurons == kDWeightNeurons);
  static_assert(kNeuronTile % C::kNeurons == 0 && kWidthTile % kStepK == 0);
  launch_clusters(clusters<DHiddenShared<C>>(l), experts_dhidden_kernel<C>,
                  dhidden_weights_map(o.w_eDF, l.experts, o.neurons, o.width),
                  DHiddenProduct{o.dy_TD, o.gate_up_RG, o.weight_R, r.dgate_up_RG, r.h_RF, r.dweight_RP,
                                 routing(l, o.token_R), o.width, o.neurons});
}

void experts_dweights(const ExpertsLaunch& l, bf16* dw, const DWeightsOperands& o) {
  if (o.transposed)
    o.add ? launch_dweights<true, true>(l, dw, o) : launch_dweights<true, false>(l, dw, o);
  else
    o.add ? launch_dweights<false, true>(l, dw, o) : launch_dweights<false, false>(l, dw, o);
}

}  // namespace upmoe::cuda::sm90
