#pragma once
// What a run says of its machine at its start: the warnings of `upmoe doctor`, a line each.

#include <filesystem>

#include "parallel/communicator.h"
#include "trainer/diagnosis/findings.h"

namespace upmoe {

// Collective.
Surroundings surroundings_of(Communicator& world);
// Once per host, of the host and of the folder that the run writes to, by a look alone: what doctor calls a failure is
// a warning here, and the run may still meet it. Collective.
void warn_of_machine(Communicator& world, const std::filesystem::path& folder);

}  // namespace upmoe
