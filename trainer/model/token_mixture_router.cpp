#include "trainer/model/token_mixture_router.h"

#include <utility>
#include <vector>

#include "kernels/ops/pointwise.h"
#include "kernels/ops/routing.h"
#include "kernels/ops/transfer.h"
#include "trainer/model/sequence_shards.h"

namespace upmoe {
namespace {

// A group's tokens may lie on several tp ranks. Each adds up the parts of its own tokens in all mixtures; the sums are
// divided evenly over the ranks, which send them on to their experts, and every rank gets all outputs back.
class TokenMixtureRouter final : public Router {
 public:
  TokenMixtureRouter(const RouterProduct& product, float temperature)
      : product_(product), temperature_(temperature) {}

  Choices forward(Exec& ex, ConstTensorView x_TD, const RouterBalance& balance, Arena& keep,
                  Saved& saved) const override {
    const RoutedGroups& groups = balance.groups;
    UPMOE_CHECK(groups.tp != nullptr, "mixtures of tokens that nobody grouped");
    const Here here = here_of(groups, x_TD.rows());
    saved.x_TD = x_TD;
    saved.part_NE = keep.take({here.tokens.groups.row_N.elements(), product_.experts()}, DType::kF32,
                              "parts of tokens in mixtures");
    saved.probs_TE = own(saved.part_NE, here);
    const TensorView mix_MD = keep.take({here.rows, x_TD.shape[1]}, x_TD.dtype, "mixtures of tokens"),
                     index_M1 = keep.take({here.rows, 1}, DType::kI32, "experts of mixtures"),
                     weight_M1 = keep.take({here.rows, 1}, DType::kF32, "weights of mixtures");
    saved.index_TK = index_M1;
    saved.weight_TK = weight_M1;
    ScratchScope scope(*ex.scratch);
    const TensorView logits_TE = ex.scratch->take(saved.probs_TE.shape, DType::kF32, "router logits");
    product_.forward(ex, logits_TE, x_TD);
    ops::mixture_parts(ex, saved.part_NE, gather_tokens(ex, *groups.tp, logits_TE), here.tokens.groups,
                       temperature_);
    mix(ex, mix_MD, x_TD, saved.probs_TE, groups, here);
    number_rows(ex, index_M1, balance.load, here);
    ops::fill(ex, weight_M1, 1.0f);
    Choices choices{index_M1, weight_M1, here.first_row + here.rows > here.mixtures};
    choices.rows_TD = mix_MD;
    return choices;
  }

  RowSums outputs(Exec& ex, const RowSums& of_tokens, Arena& keep, Saved& saved) const override {
    begin(ex, of_tokens);
    saved.output_MD = keep.take({saved.index_TK.rows(), of_tokens.out.shape[1]}, of_tokens.out.dtype,
                                "outputs of mixtures of tokens");
    return {saved.output_MD, {}};
  }
  void share_outputs(Exec& ex, TensorView y_TD, const RouterBalance& balance,
                     const Saved& saved) const override {
    const RoutedGroups& groups = balance.groups;
    ScratchScope scope(*ex.scratch);
    ops::share_mixtures(ex, y_TD, gather_tokens(ex, *groups.tp, saved.output_MD), saved.probs_TE,
                        here_of(groups, y_TD.rows()).tokens);
  }

  // The mixtures' adjoint is the sharing, and the other way round.
  ConstTensorView output_gradient(Exec& ex, ConstTensorView dy_TD, const RouterBalance& balance,
                                  Saved& saved) const override {
    saved.dy_TD = dy_TD;
    const TensorView doutput_MD =
        ex.scratch->take(saved.output_MD.shape, dy_TD.dtype, "gradients of mixtures' outputs");
    ScratchScope scope(*ex.scratch);
    mix(ex, doutput_MD, dy_TD, saved.probs_TE, balance.groups, here_of(balance.groups, dy_TD.rows()));
    return doutput_MD;
  }
  RowSums row_gradient(Exec& ex, const RowSums& of_tokens, Saved& saved) const override {
    begin(ex, of_tokens);
    saved.drow_MD = ex.scratch->take(saved.output_MD.shape, of_tokens.out.dtype, "gradients of mixtures");
    return {saved.drow_MD, {}};
  }

  // A token's part is in the mixture and in what it gets of the output.
  void backward(Exec& ex, TensorView dx_TD, ConstTensorView, const RouterBalance& balance,
                const Saved& saved) const override {
    const RoutedGroups& groups = balance.groups;
    const Here here = here_of(groups, dx_TD.rows());
    ScratchScope scope(*ex.scratch);
    const TensorView dpart_TE =
                         ex.scratch->take(saved.probs_TE.shape, DType::kF32, "gradients of tokens' parts"),
                     dlogits_NE = ex.scratch->take(saved.part_NE.shape, DType::kF32, "router logit gradient");
    GatheredTokens drows(ex, *groups.tp, saved.drow_MD), outputs(ex, *groups.tp, saved.output_MD);
    const ConstTensorView drow_MD = drows.finish();
    ops::share_mixtures(ex, dx_TD, drow_MD, saved.probs_TE, here.tokens);
    ops::mixture_part_gradient(ex, dpart_TE, saved.x_TD, drow_MD, here.tokens, Accumulate::kOverwrite);
    ops::mixture_part_gradient(ex, dpart_TE, saved.dy_TD, outputs.finish(), here.tokens, Accumulate::kAdd);
    ops::mixture_parts_backward(ex, dlogits_NE, gather_tokens(ex, *groups.tp, dpart_TE), saved.part_NE,
                                here.tokens.groups, temperature_);
    product_.backward(ex, dx_TD, own(dlogits_NE, here), saved.x_TD);
  }

 private:
  // A rank's part of the tokens, and of the rows of all mixtures, which are so many on each rank.
  struct Here {
    GroupsHere tokens;
    std::int64_t count = 0, rows = 0, first_row = 0, mixtures = 0;
  };
  Here here_of(const RoutedGroups& groups, std::int64_t T) const {
    Here here{{groups.tokens, groups.tp->rank() * T}};
    const std::int64_t ranks = groups.tp->size();
    here.count = T;
    here.mixtures = groups.tokens.count() * product_.experts();
    here.rows = (here.mixtures + ranks - 1) / ranks;
    here.first_row = groups.tp->rank() * here.rows;
    return here;
  }
  static TensorView own(TensorView of_all_NE, const Here& here) {
    return of_all_NE.rows(here.tokens.first, here.tokens.first + here.count);
  }

  // The tokens get their part of the outputs later: until then their sums are what those are added to.
  static void begin(Exec& ex, const RowSums& of_tokens) {
    ScratchScope scope(*ex.scratch);
    const TensorView no_rows_T0 =
        ex.scratch->take({of_tokens.out.rows(), 0}, DType::kI32, "rows of tokens: none");
    ops::gather_sum_rows(ex, of_tokens.out, of_tokens.out, no_rows_T0, of_tokens.onto);
  }

  // In the caller's ScratchScope.
  static void mix(Exec& ex, TensorView mix_MD, ConstTensorView x_TD, ConstTensorView part_TE,
                  const RoutedGroups& groups, const Here& here) {
    PartialSum sum(ex, *groups.tp, mix_MD);
    ops::mix_tokens(ex, sum.partial_TD(), x_TD, part_TE, here.tokens);
    sum.reduce(ex);
  }

  // Row after row the experts of a group, and of the next one; none behind the last. They are known to the host, as is
  // what each expert gets.
  void number_rows(Exec& ex, TensorView index_M1, const RouterLoad& load, const Here& here) const {
    const std::int64_t E = product_.experts();
    std::vector<std::int32_t> experts;
    std::vector<double> sums(load ? static_cast<std::size_t>(load.sums_L.elements()) : 0);
    for (std::int64_t row = here.first_row; row < here.first_row + here.rows; ++row) {
      const bool none = row >= here.mixtures;
      experts.push_back(none ? -1 : static_cast<std::int32_t>(row % E));
      if (load && !none) sums[static_cast<std::size_t>(row % E)] += 1;
    }
    ops::upload(ex, index_M1, host_view(std::as_const(experts).data(), index_M1.shape));
    if (load) ops::upload(ex, load.sums_L, host_view(std::as_const(sums).data(), load.sums_L.shape));
  }

  RouterProduct product_;
  float temperature_;
};

}  // namespace

std::unique_ptr<const Router> make_token_mixture_router(const RouterProduct& product, double temperature) {
  return std::make_unique<TokenMixtureRouter>(product, static_cast<float>(temperature));
}

}  // namespace upmoe
