#pragma once
// The Python side of the program.

#include <filesystem>
#include <string>

namespace upmoe {

// $UPMOE_PYTHON, else the environment that launch/setup.sh made, else the system's.
std::string find_python();
// A script of the source folder that this program was built from. `what` needs it: for the words where it is gone.
// Throws Error(kFailure) then.
std::filesystem::path script_of_source(const std::filesystem::path& name, const std::string& what);

}  // namespace upmoe
