#include "launch/command_line.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <vector>

#include "configs/nearest_name.h"
#include "configs/path_text.h"
#include "configs/run_config.h"
#include "configs/upcycle_config.h"

namespace upmoe {

namespace {

std::vector<std::string> command_names(const CLI::App& app) {
  std::vector<std::string> names;
  for (const CLI::App* command : app.get_subcommands([](const CLI::App*) { return true; }))
    names.push_back(command->get_name());
  return names;
}

const CLI::App* command_named(const CLI::App& app, const std::string& name) {
  for (const CLI::App* command : app.get_subcommands([](const CLI::App*) { return true; }))
    if (command->get_name() == name) return command;
  return nullptr;
}

std::vector<std::string> option_names(const CLI::App& command) {
  std::vector<std::string> names;
  for (const CLI::Option* option : command.get_options()) {
    for (const std::string& name : option->get_lnames()) names.push_back("--" + name);
    for (const std::string& name : option->get_snames()) names.push_back("-" + name);
  }
  return names;
}

std::string meant(const std::string& name, const std::vector<std::string>& candidates) {
  const std::vector<std::string> near = nearest_names(name, candidates);
  return near.empty() ? "." : fmt::format("; did you mean '{}'?", near.front());
}

// A key of the configuration with dashes before it.
bool is_key(const std::string& command, const std::string& option) {
  const std::string key = option.substr(option.find_first_not_of('-')) + " : ";
  const std::string keys = command == "train"     ? run_config_reference()
                           : command == "upcycle" ? upcycle_config_reference()
                                                  : "";
  return ("\n" + keys).find("\n" + key) != std::string::npos;
}

// The first word that looks like an option and is none; empty when all are.
std::string unknown_option(const std::vector<std::string>& known, const std::vector<std::string>& words) {
  for (const std::string& word : words) {
    if (word == "--") break;
    if (word.size() < 2 || word[0] != '-' || (word[1] >= '0' && word[1] <= '9')) continue;
    const std::string name = word.substr(0, word.find('='));
    if (std::find(known.begin(), known.end(), name) == known.end()) return name;
  }
  return "";
}

CLI::Validator number_check(const char* name, const char* expected, bool (*right)(double)) {
  return CLI::Validator(
      [expected, right](std::string& written) {
        double value = 0;
        if (CLI::detail::lexical_cast(written, value) && std::isfinite(value) && right(value))
          return std::string();
        return fmt::format("found '{}', expected a number {}", written, expected);
      },
      name);
}

}  // namespace

CLI::Validator above_zero() {
  return number_check("POSITIVE", "above 0", [](double value) { return value > 0; });
}

CLI::Validator zero_or_above() {
  return number_check("NONNEGATIVE", "of 0 or above", [](double value) { return value >= 0; });
}

CLI::Option* as_path(CLI::Option* option) {
  return option->transform(
      [](const std::string& written) {
        PathText expanded = expand_path(written);
        if (expanded.problem.empty()) return expanded.path;
        // The shell puts names that are there in the place of runs/*: what has this very name is meant, $ and all.
        std::error_code none;
        if (!std::filesystem::exists(written, none)) throw CLI::ValidationError(expanded.problem);
        return written;
      },
      "", "path");
}

std::string explain(const CLI::App& app, int argc, char** argv, const CLI::ParseError& error) {
  std::vector<std::string> words(argv + std::min(argc, 1), argv + argc);
  const std::vector<std::string> commands = command_names(app);
  if (words.empty())
    return fmt::format("a command is missing: {}; `upmoe --help` says what each does",
                       fmt::join(commands, ", "));
  const std::string first = words.front();
  const CLI::App* command = command_named(app, first);
  if (command == nullptr && first[0] == '-')
    return fmt::format("{}: options stand behind the command: upmoe COMMAND [OPTION...]; the commands are {}",
                       first, fmt::join(commands, ", "));
  if (command == nullptr)
    return fmt::format("unknown command '{}'{} The commands are {}; `upmoe --help` says what each does",
                       first, meant(first, commands), fmt::join(commands, ", "));
  words.erase(words.begin());
  const std::string help = fmt::format("`upmoe {} --help` lists everything", first);
  const std::vector<std::string> known = option_names(*command);
  if (const std::string option = unknown_option(known, words); !option.empty()) {
    if (is_key(first, option))
      return fmt::format("{}: keys of the configuration are given without dashes: {}=VALUE", option,
                         option.substr(option.find_first_not_of('-')));
    return fmt::format("unknown option '{}' of upmoe {}{} {}", option, first, meant(option, known), help);
  }
  return fmt::format("upmoe {}: {}; {}", first, error.what(), help);
}

}  // namespace upmoe
