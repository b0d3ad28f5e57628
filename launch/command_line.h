#pragma once
// The words of the command line around CLI11: what is wrong and what may have been meant, and paths.

#include <CLI/CLI.hpp>
#include <string>

namespace upmoe {

// An option or argument that is a path: ~ and ${NAME} are filled in as in configuration files (path_text.h).
CLI::Option* as_path(CLI::Option* option);
// One sentence about a command line that CLI11 refused: an unknown command or option names the nearest.
std::string explain(const CLI::App& app, int argc, char** argv, const CLI::ParseError& error);

}  // namespace upmoe
