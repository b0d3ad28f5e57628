#include "trainer/model/row_counts.h"

namespace upmoe {

void send_counts(Exec& ex, Communicator& group, ConstTensorView counts_C, ops::Landing& counts) {
  ScratchScope scope(*ex.scratch);
  const TensorView all_PC =
      ex.scratch->take({group.size(), counts_C.elements()}, DType::kI32, "rows of all ranks");
  group.all_gather(all_PC, counts_C, ex).wait();
  counts.start(ex, all_PC);
}

}  // namespace upmoe
