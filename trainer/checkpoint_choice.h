#pragma once
// Which checkpoint a run goes on from.

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "data/checkpoint_folder.h"
#include "parallel/communicator.h"

namespace upmoe {

struct PassedOver {
  std::filesystem::path folder;
  StoreFault fault;
  std::string words() const;  // what it is and why, without what becomes of it
};

struct CheckpointChoice {
  std::optional<std::filesystem::path> newest;  // usable: every byte was compared. Empty: a new run
  std::vector<PassedOver> passed_over;          // newer ones, the newest first
};

// Collective, the reading is divided over the ranks; every rank returns the same. Throws Error(kBadInput)
// that lists them when there are checkpoints but none is usable: a run never starts over by itself.
CheckpointChoice choose_checkpoint(const std::filesystem::path& checkpoints_dir, Communicator& world);

}  // namespace upmoe
