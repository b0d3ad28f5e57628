#pragma once
// Commands of `upmoe` that are Python's work (pictures, studies): the interpreter is found here, and arguments and exit
// status are passed on.

#include <string>
#include <vector>

namespace upmoe {

// Runs launch/SCRIPT of the source folder that this program was built from and waits for it; SIGTERM and SIGHUP are
// handed on. Its exit status; 128 + signal when a signal ended it. Throws Error(kFailure) where script or interpreter
// are missing.
int run_python_tool(const std::string& script, const std::vector<std::string>& arguments);

}  // namespace upmoe
