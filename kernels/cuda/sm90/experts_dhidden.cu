#include "kernels/cuda/sm90/experts_dhidden.cuh"

#include "kernels/cuda/sm90/experts.cuh"
#include "kernels/cuda/sm90/experts_launch.cuh"

namespace upmoe::cuda::sm90 {

namespace {

template <class C>
void launch_dhidden(const ExpertsLaunch& l, const DHiddenResults& r, const DHiddenOperands& o) {
  static_assert(C::kNeurons == kDWeightNeurons);
  static_assert(kNeuronTile % C::kNeurons == 0 && kWidthTile % kStepK == 0);
  launch_clusters(clusters<DHiddenShared<C>, C::kBlocks>(l), experts_dhidden_kernel<C>,
                  dhidden_weights_map(o.w_eDF, l.experts, o.neurons, o.width),
                  DHiddenProduct{o.dy_TD, o.gate_up_RG, o.weight_R, r.dgate_up_RG, r.h_RF, r.dweight_RP,
                                 routing(l, o.token_R), o.width, o.neurons});
}

}  // namespace

void experts_dhidden(const ExpertsLaunch& l, const DHiddenResults& r, const DHiddenOperands& o) {
  launch_variant(l, kDHiddenVariants, [&](auto i) {
    constexpr ExpertVariant v = kDHiddenVariants[decltype(i)::value];
    launch_dhidden<DHiddenConfig<v.blocks, v.stages, v.order, v.lag>>(l, r, o);
  });
}

}  // namespace upmoe::cuda::sm90
