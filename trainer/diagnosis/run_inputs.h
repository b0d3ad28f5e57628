#pragma once
// What a run reads before its first step: its checkpoint, its model, its teacher's, its data.

#include <filesystem>
#include <optional>
#include <vector>

#include "configs/run_config.h"
#include "parallel/communicator.h"
#include "trainer/diagnosis/findings.h"
#include "trainer/same_inputs.h"

namespace upmoe {

// Where the run would go on from.
struct StartingPoint {
  std::optional<std::filesystem::path> checkpoint;
  std::vector<Finding> passed_over;  // on rank 0: what the run would warn of
};
// Collective, and what it throws is the run's (choose_checkpoint).
StartingPoint starting_point_of(const RunConfig& run, Communicator& world);

// Opens all of it, on this rank, and reads no weights and no tokens; what it met, to be compared. Throws the error that
// the run would end with, of a file that is not there or damaged, of a model that goes with neither its data nor so
// many ranks. `first`: this is the rank that compares the configuration of the checkpoint with the run's.
ReadInputs require_inputs(RunConfig run, const std::optional<std::filesystem::path>& checkpoint, int ranks,
                          bool first);

}  // namespace upmoe
