#pragma once
// What a single layer is tested with.

#include "parallel/self_comm.h"
#include "tests/support/gradient_check.h"
#include "trainer/rank_model.h"

namespace upmoe::test {

struct Rig {
  RankMemory memory{Device{}};
  Arena keep{Device{}, std::size_t{1} << 30, "activations"};
  std::unique_ptr<Communicator> self = make_self_communicator();
  Host host{7};
  Exec& ex = memory.exec;
};

}  // namespace upmoe::test
