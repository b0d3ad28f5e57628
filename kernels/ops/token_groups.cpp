#include "kernels/ops/token_groups.h"

#include "kernels/ops/check_tensor.h"
#include "kernels/ops/dispatch.h"

namespace upmoe::ops {

namespace {

void check_groups(const Exec& ex, const TokenGroups& groups, const ConstTensorView& values_NE,
                  std::source_location where = std::source_location::current()) {
  const std::int64_t N = groups.row_N.elements();
  if (N > 0 && (groups.same < 1 || groups.size < 1 || N % groups.same != 0))
    fail_check("whole positions", where,
               fmt::format("{} tokens, {} of a position, groups of {}", N, groups.same, groups.size));
  check_tensor(ex, groups.row_N, {N}, DType::kI32, "row_N", where);
  if (values_NE.shape.rank != 2) fail_check("a row of experts for each token", where, values_NE.shape.str());
  check_tensor(ex, values_NE, {N, values_NE.shape[1]}, DType::kF32, "values_NE", where);
}

// x [T, D], mix [M, D], part [T, E], of which T rows from `first` on.
struct Mixing {
  const ConstTensorView &x_TD, &mix_MD, &part_TE;
};
void check_mixing(const Exec& ex, const Mixing& m, const GroupsHere& here,
                  std::source_location where = std::source_location::current()) {
  const std::int64_t N = here.groups.row_N.elements();
  if (m.x_TD.shape.rank != 2 || m.mix_MD.shape.rank != 2 || m.part_TE.shape.rank != 2)
    fail_check("rows", where,
               fmt::format("x_TD {}, mix_MD {}, part_TE {}", m.x_TD.shape.str(), m.mix_MD.shape.str(),
                           m.part_TE.shape.str()));
  const std::int64_t T = m.x_TD.shape[0], D = m.x_TD.shape[1], E = m.part_TE.shape[1];
  if (here.first < 0 || here.first + T > N || m.mix_MD.shape[0] < here.groups.count() * E)
    fail_check("all rows are there", where,
               fmt::format("tokens {} to {} of {}, {} mixtures of {} groups and {} experts", here.first,
                           here.first + T, N, m.mix_MD.shape[0], here.groups.count(), E));
  check_float(m.x_TD, "x_TD");
  check_tensor(ex, here.groups.row_N, {N}, DType::kI32, "row_N", where);
  check_tensor(ex, m.x_TD, m.x_TD.shape, m.x_TD.dtype, "x_TD", where);
  check_tensor(ex, m.mix_MD, {m.mix_MD.shape[0], D}, m.x_TD.dtype, "mix_MD", where);
  check_tensor(ex, m.part_TE, {T, E}, DType::kF32, "part_TE", where);
}

double mixing_flops(const Mixing& m) {
  return 2.0 * static_cast<double>(m.x_TD.elements()) * static_cast<double>(m.part_TE.shape[1]);
}

}  // namespace

void choose_tokens(Exec& ex, TensorView index_NE, ConstTensorView probs_NE, const TokenGroups& groups,
                   const GroupCapacity& capacity) {
  check_groups(ex, groups, probs_NE);
  check_tensor(ex, index_NE, probs_NE.shape, DType::kI32, "index_NE");
  UPMOE_CHECK(groups.count() == 0 || (capacity.full >= 0 && capacity.full <= groups.size &&
                                      capacity.last >= 0 && capacity.last <= groups.last_size()),
              "{} tokens of {}, {} of {}", capacity.full, groups.size, capacity.last, groups.last_size());
  ex.book("choose_tokens", 0, bytes_of(probs_NE) + bytes_of(groups.row_N), bytes_of(index_NE));
  dispatch(ex, &Backend::choose_tokens, index_NE, probs_NE, groups, capacity);
}

void mixture_parts(Exec& ex, TensorView part_NE, ConstTensorView logits_NE, const TokenGroups& groups,
                   float temperature) {
  check_groups(ex, groups, logits_NE);
  check_tensor(ex, part_NE, logits_NE.shape, DType::kF32, "part_NE");
  UPMOE_CHECK(temperature > 0, "temperature {}", temperature);
  ex.book("mixture_parts", 5.0 * static_cast<double>(part_NE.elements()),
          bytes_of(logits_NE) + bytes_of(groups.row_N), bytes_of(part_NE));
  dispatch(ex, &Backend::mixture_parts, part_NE, logits_NE, groups, temperature);
}

void mixture_parts_backward(Exec& ex, TensorView dlogits_NE, ConstTensorView dpart_NE,
                            ConstTensorView part_NE, const TokenGroups& groups, float temperature) {
  check_groups(ex, groups, part_NE);
  check_tensor(ex, dpart_NE, part_NE.shape, DType::kF32, "dpart_NE");
  check_tensor(ex, dlogits_NE, part_NE.shape, DType::kF32, "dlogits_NE");
  UPMOE_CHECK(temperature > 0, "temperature {}", temperature);
  ex.book("mixture_parts_backward", 4.0 * static_cast<double>(part_NE.elements()),
          2 * bytes_of(part_NE) + bytes_of(groups.row_N), bytes_of(dlogits_NE));
  dispatch(ex, &Backend::mixture_parts_backward, dlogits_NE, dpart_NE, part_NE, groups, temperature);
}

void mix_tokens(Exec& ex, TensorView mix_MD, ConstTensorView x_TD, ConstTensorView part_TE,
                const GroupsHere& here) {
  const ConstTensorView mix = mix_MD;
  check_mixing(ex, {x_TD, mix, part_TE}, here);
  ex.book("mix_tokens", mixing_flops({x_TD, mix, part_TE}),
          bytes_of(x_TD) + bytes_of(part_TE) + bytes_of(here.groups.row_N), bytes_of(mix_MD),
          Work::kGroupedProducts);
  dispatch(ex, &Backend::mix_tokens, mix_MD, x_TD, part_TE, here);
}

void share_mixtures(Exec& ex, TensorView y_TD, ConstTensorView mix_MD, ConstTensorView part_TE,
                    const GroupsHere& here) {
  const ConstTensorView y = y_TD;
  check_mixing(ex, {y, mix_MD, part_TE}, here);
  ex.book("share_mixtures", mixing_flops({y, mix_MD, part_TE}),
          bytes_of(mix_MD) + bytes_of(part_TE) + bytes_of(here.groups.row_N) + bytes_of(y_TD), bytes_of(y_TD),
          Work::kGroupedProducts);
  dispatch(ex, &Backend::share_mixtures, y_TD, mix_MD, part_TE, here);
}

void mixture_part_gradient(Exec& ex, TensorView dpart_TE, ConstTensorView x_TD, ConstTensorView mix_MD,
                           const GroupsHere& here, Accumulate mode) {
  const ConstTensorView dpart = dpart_TE;
  check_mixing(ex, {x_TD, mix_MD, dpart}, here);
  ex.book("mixture_part_gradient", mixing_flops({x_TD, mix_MD, dpart}),
          bytes_of(x_TD) + bytes_of(mix_MD) + bytes_of(here.groups.row_N) +
              (mode == Accumulate::kAdd ? bytes_of(dpart_TE) : 0.0),
          bytes_of(dpart_TE), Work::kGroupedProducts);
  dispatch(ex, &Backend::mixture_part_gradient, dpart_TE, x_TD, mix_MD, here, mode);
}

}  // namespace upmoe::ops
