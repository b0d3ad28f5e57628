#include "kernels/cuda/sm90/experts_down.cuh"

#include "kernels/cuda/sm90/experts.cuh"
#include "kernels/cuda/sm90/experts_launch.cuh"

namespace upmoe::cuda::sm90 {

namespace {

template <class C>
void launch_rows(const ExpertsLaunch& l, bf16* out, const RowsOperands& o) {
  // columns: D; inner: F or 2F
  static_assert(kWidthTile % C::kColumns == 0 && kNeuronTile % kStepK == 0);
  launch_clusters(clusters<RowsShared<C>, C::kBlocks>(l), experts_rows_kernel<C>,
                  rows_map(o.in, l.rows, o.inner), rows_weights_map<C>(o.w, l.experts, o.columns, o.inner),
                  RowsProduct{out, l.offset_e1, l.experts, o.inner, o.columns});
}

template <Major kWeights>
void launch_rows(const ExpertsLaunch& l, bf16* out, const RowsOperands& o) {
  launch_variant(l, kRowsVariants, [&](auto i) {
    constexpr ExpertVariant v = kRowsVariants[decltype(i)::value];
    static_assert(v.lag == 0, "no rows are gathered");
    launch_rows<RowsConfig<kWeights, v.blocks, v.stages, v.order>>(l, out, o);
  });
}

}  // namespace

void experts_rows(const ExpertsLaunch& l, bf16* out, const RowsOperands& o) {
  o.transposed ? launch_rows<Major::kK>(l, out, o) : launch_rows<Major::kMN>(l, out, o);
}

}  // namespace upmoe::cuda::sm90
