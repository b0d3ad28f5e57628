#pragma once
// Rows on their way to other ranks. What was sent stays untouched until wait(); the rows that arrived, and what they
// were sent from, lie in the scratch arena: from the sending to the last reading in one ScratchScope of the caller.

#include "kernels/ops/expert_ffn.h"
#include "parallel/communicator.h"

namespace upmoe {

struct RowsUnderWay {
  Pending pending;       // nothing, where the rows do not leave their rank
  ops::PickedRows rows;  // an index without a shape: all of them, as they lie
  const ops::PickedRows& wait() {
    pending.wait();
    return rows;
  }
};

}  // namespace upmoe
