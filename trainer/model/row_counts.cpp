#include "trainer/model/row_counts.h"

#include "kernels/ops/transfer.h"

namespace upmoe {

std::vector<std::int32_t> counts_of_all(Exec& ex, Communicator& group, ConstTensorView counts_C) {
  const Shape shape{group.size(), counts_C.elements()};
  TensorView all_PC = ex.scratch->take(shape, DType::kI32, "rows of all ranks");
  group.all_gather(all_PC, counts_C, ex).wait();
  std::vector<std::int32_t> all(static_cast<std::size_t>(shape.elements()));
  ops::download(ex, host_view(all.data(), shape), all_PC);
  return all;
}

}  // namespace upmoe
