// upmoe report: pictures of one run or several. Drawing is Python's work (launch/report.py, matplotlib); this
// finds the interpreter and passes arguments and exit status on.

#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>

#include "launch/command_line.h"
#include "launch/commands.h"
#include "launch/python.h"

namespace upmoe {

namespace {

struct ReportArguments {
  std::vector<std::string> runs, labels;
  std::string out, against = "tokens";
  bool continued = false;
};

// Runs a program found on PATH and waits for it. Its exit status; 128 + signal when a signal ended it.
int run_program(std::vector<std::string> words) {
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  pid_t child = 0;
  if (const int error = posix_spawnp(&child, argv[0], nullptr, nullptr, argv.data(), environ); error != 0)
    fail(ExitCode::kFailure, "cannot start {}: {}; run launch/setup.sh, or set UPMOE_PYTHON", words[0],
         std::strerror(error));
  int status = 0;
  while (waitpid(child, &status, 0) < 0)
    if (errno != EINTR) fail(ExitCode::kFailure, "waiting for {}: {}", words[0], std::strerror(errno));
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

int run_report(const ReportArguments& a, Runtime& runtime) {
  if (runtime.world().rank() != 0) return 0;  // under mpirun the first rank draws
  const std::filesystem::path script = script_of_source("launch/report.py", "the pictures");
  std::vector<std::string> words{find_python(), script.string(), "--against", a.against};
  if (!a.out.empty()) words.insert(words.end(), {"--out", a.out});
  for (const std::string& label : a.labels) words.insert(words.end(), {"--label", label});
  if (a.continued) words.emplace_back("--continued");
  words.emplace_back("--");
  words.insert(words.end(), a.runs.begin(), a.runs.end());
  return run_program(std::move(words));
}

}  // namespace

void add_report(CLI::App& app, Handler& handler) {
  auto a = std::make_shared<ReportArguments>();
  CLI::App* command = app.add_subcommand("report", "Pictures of runs: PNG and one self-contained HTML page");
  as_path(
      command->add_option("runs", a->runs, "Run directories; several are laid over each other")->required());
  as_path(command->add_option("--out", a->out,
                              "Folder for the results (default: report/ in the first run directory)"));
  command->add_option("--against", a->against, "Horizontal axis: tokens, flops, seconds or step")
      ->check(CLI::IsMember({"tokens", "flops", "seconds", "step"}))
      ->capture_default_str();
  command->add_option("--label", a->labels, "Name of a run, once per run (default: its folder's name)")
      ->take_all()
      ->allow_extra_args(false);
  command->add_flag("--continued", a->continued,
                    "The first run is where the others started: draw them from its end on");
  command->callback([a, &handler] { handler = [a](Runtime& runtime) { return run_report(*a, runtime); }; });
}

}  // namespace upmoe
