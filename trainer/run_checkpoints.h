#pragma once
// The checkpoints of a run while it trains. A save that fails does not stop training: the older ones are
// intact, and the next interval tries again.

#include <filesystem>
#include <optional>

#include "configs/run_config.h"
#include "trainer/checkpoint.h"
#include "trainer/checkpoint_keeper.h"
#include "trainer/run_lock.h"

namespace upmoe {

// Every call is collective.
class RunCheckpoints {
 public:
  RunCheckpoints(const std::filesystem::path& run_dir, const RunConfig::Checkpoint& rule,
                 Communicator& world);

  const std::filesystem::path& dir() const { return dir_; }
  // Rank 0's, which outlives this; null on the others. From now on the folder is this run's: what killed
  // saves left is cleared.
  void take_over(RunLock* lock);
  // The one to go on from; empty: none is there. Throws Error(kBadInput) when there are some, but none is usable.
  std::optional<std::filesystem::path> choose();
  // It was of `step`, which need not be saved again.
  void resumed(const std::filesystem::path& from, std::int64_t step);
  bool busy() const { return writer_.busy(); }

  // These throw when the run's folder is no longer where it was.
  void begin(Session& session, const TrainState& state, bool in_background);
  void finish();  // the one under way
  void poll();    // commits a background checkpoint once every rank's part lies on the disk
  // The last one of this job: throws Error(kBadInput) when it cannot be written.
  void save_last(Session& session, const TrainState& state);

 private:
  void start(Session& session, const TrainState& state, bool in_background, bool last);
  void conclude(bool last);
  bool retire_after_full_disk(bool last);
  void require_folder();

  std::filesystem::path dir_;
  Communicator& world_;
  CheckpointWriter writer_;
  CheckpointKeeper keeper_;  // rank 0's is asked
  RunLock* lock_ = nullptr;
  std::int64_t saved_step_ = -1;
};

}  // namespace upmoe
