#pragma once
// One rank alone: every verb is a copy to itself.

#include <memory>

#include "parallel/communicator.h"

namespace upmoe {

std::unique_ptr<Communicator> make_self_communicator();

}  // namespace upmoe
