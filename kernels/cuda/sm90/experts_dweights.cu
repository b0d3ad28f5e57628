#include "kernels/cuda/sm90/experts_dweights.cuh"

#include "kernels/cuda/sm90/experts.cuh"
#include "kernels/cuda/sm90/experts_launch.cuh"

namespace upmoe::cuda::sm90 {

namespace {

template <class C>
void launch_dweights(const ExpertsLaunch& l, bf16* dw, const DWeightsOperands& o) {
  // columns_y: F or 2F; columns_x: D
  static_assert(kNeuronTile % C::kRowsY == 0 && kWidthTile % C::kColumnsX == 0);
  if (o.columns_x % (C::kBlocks * C::kColumnsX) != 0)  // a cluster's blocks have a column of tiles each
    throw std::runtime_error("gradients of weights in clusters of " + std::to_string(C::kBlocks) +
                             " for a width of " + std::to_string(o.columns_x));
  launch_clusters(clusters<DWeightsShared<C>, C::kBlocks>(l), experts_dweights_kernel<C>,
                  gradient_rows_map(o.y_RY, l.rows, o.columns_y),
                  WeightsGradient{o.x_TX, dw, o.ranking_e, routing(l, o.token_R), o.columns_y, o.columns_x});
}

template <bool kTransposed, bool kAdd>
void launch_dweights(const ExpertsLaunch& l, bf16* dw, const DWeightsOperands& o) {
  launch_variant(l, kDWeightsVariants, [&](auto i) {
    constexpr ExpertVariant v = kDWeightsVariants[decltype(i)::value];
    launch_dweights<DWeightsConfig<kTransposed, kAdd, v.blocks, v.stages, v.order, v.lag>>(l, dw, o);
  });
}

}  // namespace

void experts_dweights(const ExpertsLaunch& l, bf16* dw, const DWeightsOperands& o) {
  if (o.transposed)
    o.add ? launch_dweights<true, true>(l, dw, o) : launch_dweights<true, false>(l, dw, o);
  else
    o.add ? launch_dweights<false, true>(l, dw, o) : launch_dweights<false, false>(l, dw, o);
}

}  // namespace upmoe::cuda::sm90
