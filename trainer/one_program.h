#pragma once
// Whether all ranks run the same build: two builds on two hosts would train, and differ in some later digit.

#include <string>

#include "parallel/communicator.h"

namespace upmoe {

// The digest of the program's file, read once on every rank. Throws Error(kUsage) where they differ, and what reading
// failed with. Collective.
std::string require_one_program(Communicator& world);

}  // namespace upmoe
