#pragma once
// The checkpoints of a run while it trains. A save that fails does not stop training: the older ones are
// intact, and the next interval tries again.

#include <filesystem>

#include "trainer/checkpoint.h"

namespace upmoe {

// Every call is collective.
class RunCheckpoints {
 public:
  RunCheckpoints(const std::filesystem::path& run_dir, int keep, Communicator& world);

  const std::filesystem::path& dir() const { return dir_; }
  void resumed_from(std::int64_t step) { saved_step_ = step; }  // that one need not be saved again
  bool busy() const { return writer_.busy(); }

  void begin(Session& session, const TrainState& state, bool in_background);
  void finish();  // the one under way
  void poll();    // commits a background checkpoint once every rank's part lies on the disk
  // The last one of this job: throws Error(kBadInput) when it cannot be written.
  void save_last(Session& session, const TrainState& state);

 private:
  std::filesystem::path dir_;
  Communicator& world_;
  CheckpointWriter writer_;
  std::int64_t saved_step_ = -1;
};

}  // namespace upmoe
