#pragma once
// Whether all ranks run the same build: two builds on two hosts would train, and differ in some later digit.

#include "parallel/communicator.h"

namespace upmoe {

// Reads the program's file once on every rank. Throws Error(kUsage) where they differ, and what reading failed with.
// Collective.
std::string require_one_program(Communicator& world);

}  // namespace upmoe
