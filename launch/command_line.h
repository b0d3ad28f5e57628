#pragma once
// The words of the command line around CLI11: what is wrong and what may have been meant, and paths.

#include <CLI/CLI.hpp>
#include <algorithm>
#include <string>
#include <vector>

#include "configs/names.h"

namespace upmoe {

// An option or argument that is a path: ~ and ${NAME} are filled in as in configuration files (path_text.h), but what
// exists under a name that cannot be filled in is meant itself.
CLI::Option* as_path(CLI::Option* option);
// What a number has to be, in words: CLI11's own checks name the largest double in 309 digits. No text and what is not
// finite is refused as well, which CLI11 would read as 0 where no check stands.
CLI::Validator above_zero();
CLI::Validator zero_or_above();
// An option whose value is one of an enum's names; `target` has the default, which the help lists first.
template <HasNames Enum>
CLI::Option* add_choice(CLI::App& command, const std::string& name, Enum& target,
                        const std::string& description) {
  std::vector<std::string> names = name_list<Enum>().built;
  std::rotate(names.begin(), std::find(names.begin(), names.end(), name_of(target)), names.end());
  return command
      .add_option_function<std::string>(
          name, [&target](const std::string& word) { target = *value_named<Enum>(word); }, description)
      ->default_str(name_of(target))
      ->check(CLI::IsMember(names));
}
// One sentence about a command line that CLI11 refused: an unknown command or option names the nearest.
std::string explain(const CLI::App& app, int argc, char** argv, const CLI::ParseError& error);

}  // namespace upmoe
