#pragma once
// Whether the hosts of a job write to one place.

#include <filesystem>

#include "parallel/communicator.h"

namespace upmoe {

// Whether this rank sees in `folder`, which each rank names for itself, a file that rank 0 makes there and takes away
// again; true where rank 0 cannot make one, which is another fault and is met where it works there. Collective.
bool sees_files_of_rank_0(Communicator& world, const std::filesystem::path& folder);

// In words, of a folder that this rank's host has for itself.
std::string words_of_unshared(const std::filesystem::path& folder);

// Throws Error(kBadInput) on every rank when one on another host has a folder of its own. Collective.
void require_shared(Communicator& world, const std::filesystem::path& folder);

}  // namespace upmoe
