#pragma once
// Saving and loading of a session through the shard store, in any layout; the slow part runs on a thread of its own.

#include <atomic>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <thread>

#include "data/model_source.h"
#include "data/shard_store.h"
#include "data/store_writer.h"
#include "trainer/session.h"

namespace upmoe {

struct TrainState {
  std::int64_t step = 0;       // finished optimizer steps
  std::int64_t samples = 0;    // sequences consumed: where the data order goes on
  std::string source;          // model directory the run started from: tokenizer files come from there
  std::string source_digest;   // of that model (resumption.h)
  std::string fingerprint;     // of the data order
  std::string teacher_digest;  // likewise, of the teacher; empty: none
  std::map<std::string, std::int64_t> moments_begun = {};  // RunMetadata
};

// One save at a time: begin() copies what this rank owns and returns; a thread writes; finish() makes it visible.
class CheckpointWriter {
 public:
  explicit CheckpointWriter(std::filesystem::path checkpoints_dir);
  ~CheckpointWriter();

  // Collective. Throws (on all ranks) when one lacks memory for its copy, or when the folder cannot be made or lacks
  // space; then nothing is under way.
  void begin(Session& session, const TrainState& state, Communicator& world, bool in_background);
  bool busy() const { return writer_ != nullptr; }
  bool written() const;  // this rank's part lies on the disk; local
  struct Committed {
    std::filesystem::path folder;
    bool durable = false;  // false: complete, but a power cut may still take its name away
  };
  // Collective: waits for the writing, commits.
  Committed finish(Communicator& world);
  bool lacked_space() const { return lacked_space_; }  // why the last finish() failed, on this rank

  static std::uint64_t bytes_of(const Session& session);  // of this rank's part

 private:
  std::filesystem::path dir_, target_;
  struct Staged;
  static void stage(Session& session, Staged& staged);
  std::unique_ptr<Staged> staged_;
  std::unique_ptr<StoreWriter> writer_;
  std::string metadata_;
  std::jthread thread_;
  std::atomic<bool> written_{false};
  bool lacked_space_ = false;
};

// Fills weights, masters and moments from a store, whatever layout and precision wrote it. Throws
// Error(kBadInput) that lists every difference between the store's model and the session's.
TrainState load_checkpoint(const ShardStore& store, Session& session);

// The beginning of a run: weights from a model and masters as precise as it has them, moments at zero.
void load_model(const ModelSource& model, Session& session);

}  // namespace upmoe
