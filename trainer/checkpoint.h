#pragma once
// Saving and loading of a session through the shard store, in any layout; the slow part runs on a thread of
// its own.

#include <atomic>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <thread>

#include "data/shard_store.h"
#include "trainer/session.h"

namespace upmoe {

struct TrainState {
  std::int64_t step = 0;     // finished optimizer steps
  std::int64_t samples = 0;  // sequences consumed: where the data order goes on
  std::string source;        // model directory the run started from: tokenizer files come from there
  std::string fingerprint;   // of the data order
};

// One save at a time: begin() copies what this rank owns and returns; a thread writes; finish() makes it
// visible.
class CheckpointWriter {
 public:
  explicit CheckpointWriter(std::filesystem::path checkpoints_dir, int keep);
  ~CheckpointWriter();

  // Collective. Throws (on all ranks) when the folder cannot be made or lacks space; then nothing is under
  // way.
  void begin(Session& session, const TrainState& state, Communicator& world, bool in_background);
  bool busy() const { return writer_ != nullptr; }
  bool written() const;  // this rank's part lies on the disk; local
  // Collective: waits for the writing, commits, removes checkpoints beyond `keep`. Returns the folder.
  std::filesystem::path finish(Communicator& world);

 private:
  void retire_old(Communicator& world) const;
  std::filesystem::path dir_, target_;
  int keep_;
  struct Staged;
  std::unique_ptr<Staged> staged_;
  std::unique_ptr<StoreWriter> writer_;
  std::string metadata_;
  std::jthread thread_;
  std::atomic<bool> written_{false};
};

// Fills weights, masters and moments from a store, whatever layout wrote it. Throws Error(kBadInput) that
// lists every difference between the store's model and the session's.
TrainState load_checkpoint(const ShardStore& store, Session& session);

// The newest usable checkpoint of a run: damaged ones are skipped with a warning that names the damage.
// Collective: every rank returns the same. Empty when there is none.
std::optional<std::filesystem::path> newest_usable(const std::filesystem::path& checkpoints_dir,
                                                   Communicator& world);

}  // namespace upmoe
