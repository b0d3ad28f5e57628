#include "launch/python_tool.h"

#include <sys/wait.h>

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

// Its exit status; 128 + signal when a signal ended it.
int status_of(pid_t child, const std::string& script) {
  int status = 0;
  while (waitpid(child, &status, 0) < 0)
    if (errno != EINTR) fail(ExitCode::kFailure, "waiting for {}: {}", script, std::strerror(errno));
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

}  // namespace

int run_python_tool(const std::string& script, const std::vector<std::string>& arguments) {
  const std::filesystem::path path =
      script_of_source(std::filesystem::path("launch") / script, "this command");
  std::vector<std::string> words{path.string()};
  words.insert(words.end(), arguments.begin(), arguments.end());
  listen_for_the_tool();
  tool = spawn_python(words);
  return status_of(tool, script);
}

}  // namespace upmoe
