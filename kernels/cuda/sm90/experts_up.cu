#include "kernels/cuda/sm90/experts_up.cuh"

#include "kernels/cuda/sm90/experts.cuh"
#include "kernels/cuda/sm90/experts_launch.cuh"

namespace upmoe::cuda::sm90 {

namespace {

template <class C>
void launch_up(const ExpertsLaunch& l, bf16* gate_up_RG, bf16* h_RF, const UpOperands& o) {
  static_assert(kNeuronTile % C::kNeurons == 0 && kWidthTile % kStepK == 0);
  launch_clusters(clusters<UpShared<C>, C::kBlocks>(l), experts_up_kernel<C>,
                  up_weights_map<C>(o.w_eGD, l.experts, o.neurons, o.width),
                  UpProduct{o.x_TD, o.weight_R, gate_up_RG, h_RF, routing(l, o.token_R), o.width, o.neurons});
}

}  // namespace

void experts_up(const ExpertsLaunch& l, bf16* gate_up_RG, bf16* h_RF, const UpOperands& o) {
  launch_variant(l, kUpVariants, [&](auto i) {
    constexpr ExpertVariant v = kUpVariants[decltype(i)::value];
    launch_up<UpConfig<v.blocks, v.stages, v.order, v.lag>>(l, gate_up_RG, h_RF, o);
  });
}

}  // namespace upmoe::cuda::sm90
