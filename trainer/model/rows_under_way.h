#pragma once
// Rows on their way to other ranks. What was sent stays untouched until wait(); it lies in the scratch arena, and the
// rows that arrived do where the caller named no other: from the sending to the last reading in one ScratchScope.

#include "kernels/ops/expert_ffn.h"
#include "parallel/communicator.h"

namespace upmoe {

struct RowsUnderWay {
  Pending pending;        // nothing, where the rows do not leave their rank
  ops::PickedRows rows;   // an index without a shape: all of them, as they lie
  Arena* into = nullptr;  // where rows lie that go on from here; null: the scratch arena
  const ops::PickedRows& wait() {
    pending.wait();
    return rows;
  }
};

}  // namespace upmoe
