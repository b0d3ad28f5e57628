#include "launch/python_tool.h"

#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <filesystem>

#include "kernels/core/check.h"
#include "launch/python.h"

namespace upmoe {

namespace {

// Of the tool that runs; a signal handler may use it.
std::atomic<pid_t> tool{0};
static_assert(std::atomic<pid_t>::is_always_lock_free);

void hand_on(int number) {
  if (const pid_t child = tool; child > 0) kill(child, number);
}

// A request to end is the tool's to carry out. Ctrl-C needs no handing on: the terminal tells the tool as well. What is
// ignored, as under nohup, stays so.
void listen_for_the_tool() {
  for (const int number : {SIGTERM, SIGHUP, SIGINT})
    if (std::signal(number, number == SIGINT ? [](int) {} : hand_on) == SIG_IGN) std::signal(number, SIG_IGN);
}

// Runs a program found on PATH and waits for it. Its exit status; 128 + signal when a signal ended it.
int run_program(std::vector<std::string> words) {
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  listen_for_the_tool();
  pid_t child = 0;
  if (const int error = posix_spawnp(&child, argv[0], nullptr, nullptr, argv.data(), environ); error != 0)
    fail(ExitCode::kFailure, "cannot start {}: {}; run launch/setup.sh, or set UPMOE_PYTHON", words[0],
         std::strerror(error));
  tool = child;
  int status = 0;
  while (waitpid(child, &status, 0) < 0)
    if (errno != EINTR) fail(ExitCode::kFailure, "waiting for {}: {}", words[0], std::strerror(errno));
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

}  // namespace

int run_python_tool(const std::string& script, const std::vector<std::string>& arguments) {
  const std::filesystem::path path =
      script_of_source(std::filesystem::path("launch") / script, "this command");
  std::vector<std::string> words{find_python(), path.string()};
  words.insert(words.end(), arguments.begin(), arguments.end());
  return run_program(std::move(words));
}

}  // namespace upmoe
