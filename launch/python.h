#pragma once
// The Python side of the program.

#include <sys/types.h>

#include <filesystem>
#include <string>
#include <utility>
#include <vector>

namespace upmoe {

// $UPMOE_PYTHON, else the environment that launch/setup.sh made, else the system's.
std::string find_python();
// Starts it with these arguments, as a process of its own; `files` of this process are its own by those numbers. Throws
// Error(kFailure) where it cannot be started. The caller waits for it.
pid_t spawn_python(const std::vector<std::string>& arguments,
                   const std::vector<std::pair<int, int>>& files = {});
// A script of the source folder that this program was built from. `what` needs it: for the words where it is gone.
// Throws Error(kFailure) then.
std::filesystem::path script_of_source(const std::filesystem::path& name, const std::string& what);

}  // namespace upmoe
