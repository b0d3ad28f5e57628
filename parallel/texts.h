#pragma once
// Texts of any length between ranks. Collective.

#include <string>
#include <vector>

#include "parallel/communicator.h"

namespace upmoe {

std::vector<std::string> gather_text(Communicator& comm, const std::string& mine);  // everybody's, everywhere
std::string broadcast_text(Communicator& comm, const std::string& text, int root);  // root's, everywhere

}  // namespace upmoe
