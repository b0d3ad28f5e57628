#pragma once
// A communicator that compares what the ranks are about to do before they do it: ranks that have lost step
// get a message with both ranks and both verbs, where a bare transport would hang or mix up two messages.
// Every verb waits for the whole group first, which costs a round trip and hides no transfer: for tests and
// for finding a bug, not for training.

#include <memory>

#include "parallel/communicator.h"

namespace upmoe {

// Verb, shape, dtype and row counts are compared; ranks out of step raise Error(kCommunicator). As each verb waits
// for its group, all groups must be used in one order as well.
std::unique_ptr<Communicator> make_checked_communicator(std::unique_ptr<Communicator> comm);

}  // namespace upmoe
