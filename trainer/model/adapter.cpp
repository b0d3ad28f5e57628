#include "trainer/model/adapter.h"

#include "kernels/ops/pointwise.h"

namespace upmoe {

namespace {

// How many experts it is of; 1 of a dense product.
std::int64_t experts_of(const TensorView& factor) {
  return factor.shape.rank == 3 ? factor.shape[0] : 1;
}

TensorView as_rows(const TensorView& x, std::int64_t rows) {
  return x.reshape({rows, rows == 0 ? 0 : x.elements() / rows});
}

// A module's gradient out of the columns of that of all modules.
void put(Exec& ex, const GradientView& gradient, std::int64_t rows, ConstTensorView from,
         std::int64_t column) {
  const TensorView into = as_rows(gradient, rows);
  const std::int64_t width = into.shape[1];
  if (!gradient.adds()) return ops::copy_columns(ex, into, 0, from, column, width);
  ScratchScope scope(*ex.scratch);
  const TensorView own = ex.scratch->take(into.shape, into.dtype, "adapter gradient of a module");
  ops::copy_columns(ex, own, 0, from, column, width);
  ops::add(ex, into, into, own);
}

}  // namespace

std::int64_t Adapter::rank() const {
  return static_cast<std::int64_t>(modules.size()) * modules.front().a.value.shape[-2];
}

// Its matrices are the product's as they lie.
bool Adapter::is_alone() const {
  return modules.size() == 1 && modules.front().step == 1 && modules.front().b.value.shape[-2] == rows;
}

Shape Adapter::joined_a() const {
  Shape shape = modules.front().a.value.shape;
  shape.dim[static_cast<std::size_t>(shape.rank) - 2] = rank();
  return shape;
}

Shape Adapter::joined_b() const {
  Shape shape = modules.front().b.value.shape;
  const auto last = static_cast<std::size_t>(shape.rank) - 1;
  shape.dim[last] = rank();
  shape.dim[last - 1] = rows;
  return shape;
}

// As many rows as the module's b has, of all experts, one behind the other; where it takes every second row, the rows
// are read in pairs, and its columns begin in the first or in the second of each.
TensorView Adapter::place_of_b(const TensorView& joined, const AdaptedModule& module) const {
  const std::int64_t experts = experts_of(joined), own = module.b.value.shape[-2];
  UPMOE_CHECK(module.step == 1 ? experts == 1 || own == rows : own * module.step == rows,
              "{} rows of an adapter from {} in steps of {}, of {}", own, module.first, module.step, rows);
  const std::int64_t begin = module.first / module.step;
  return as_rows(joined, experts * rows / module.step).rows(begin, begin + experts * own);
}

LowRank Adapter::factors(Exec& ex) const {
  const Param &a = modules.front().a, &b = modules.front().b;
  if (is_alone()) return {a.value, b.value, scale};
  const std::int64_t own_rank = a.value.shape[-2], experts = experts_of(a.value);
  // A rank without experts has no columns to put side by side.
  if (experts == 0) return {a.value.reshape(joined_a()), b.value.reshape(joined_b()), scale};
  const TensorView all_a = ex.scratch->take(joined_a(), a.value.dtype, "joined adapters, a"),
                   all_b = ex.scratch->take(joined_b(), b.value.dtype, "joined adapters, b");
  ops::fill(ex, all_b, 0.0f);
  std::int64_t column = 0;
  for (const AdaptedModule& m : modules) {
    const TensorView own_a = as_rows(m.a.value, experts), rows_b = place_of_b(all_b, m);
    ops::copy_columns(ex, as_rows(all_a, experts), column * a.value.shape[-1], own_a, 0, own_a.shape[1]);
    ops::copy_columns(ex, rows_b, m.first % m.step * rank() + column, as_rows(m.b.value, rows_b.rows()), 0,
                      own_rank);
    column += own_rank;
  }
  return {all_a, all_b, scale};
}

LowRankGradient Adapter::gradients(Exec& ex) const {
  const Param &a = modules.front().a, &b = modules.front().b;
  if (is_alone()) return {a.write_grad(), b.write_grad()};
  return {
      {ex.scratch->take(joined_a(), a.grad.dtype, "joined adapters' gradient, a"), Accumulate::kOverwrite},
      {ex.scratch->take(joined_b(), b.grad.dtype, "joined adapters' gradient, b"), Accumulate::kOverwrite}};
}

void Adapter::share_gradients(Exec& ex, const LowRankGradient& dw) const {
  if (is_alone()) return;
  const std::int64_t own_rank = modules.front().a.value.shape[-2], K = modules.front().a.value.shape[-1],
                     experts = experts_of(modules.front().a.value);
  if (experts == 0) return;
  std::int64_t column = 0;
  for (const AdaptedModule& m : modules) {
    const TensorView rows_b = place_of_b(dw.b, m);
    put(ex, m.a.write_grad(), experts, as_rows(dw.a, experts), column * K);
    put(ex, m.b.write_grad(), rows_b.rows(), rows_b, m.first % m.step * rank() + column);
    column += own_rank;
  }
}

}  // namespace upmoe
