// Each wrapper of an instruction on the GPU, by the cases that the model of the hardware is tested with.
//
// In processes of their own: a case that hangs or faults takes the context of its process with it, and the cases behind
// it go on in another one. The process that starts them never calls CUDA.

#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <exception>
#include <functional>

#include "tests/bench/sm90/gpu.cuh"
#include "tests/kernels/sm90_instructions_cases.h"

namespace sm90_bench {

namespace {

constexpr unsigned kSeconds = 15;  // of a case, the making of a context with it

struct Gpu {
  template <class T>
  using Buffer = Memory<T>;
  template <class... Parameters, class... Arguments>
  static void run(void (*kernel)(Parameters...), int blocks, int threads, std::size_t shared_bytes,
                  int cluster, const Arguments&... arguments) {
    launch(kernel, blocks, threads, shared_bytes, cluster, arguments...);
    CHECK_GPU(cudaDeviceSynchronize());
  }
};

struct Case {
  const char* name;
  std::function<std::string()> wrong;
};
std::vector<Case> all_cases() {
  std::vector<Case> cases;
  upmoe::cuda::sm90::InstructionCases<Gpu>::each([&](const char* name, const auto& wrong) {
    cases.push_back({name, wrong});
  });
  return cases;
}

struct Progress {  // of a process, for the one that started it
  std::size_t at;
  int failures;
};

void tell(Progress& progress, const Case& c, const std::string& wrong) {
  progress.failures += !wrong.empty();
  std::printf("{\"instruction\": \"%s\", \"right\": %s}\n", c.name, wrong.empty() ? "true" : "false");
  std::printf("%s  %s%s%s\n", wrong.empty() ? "ok  " : "WRONG", c.name, wrong.empty() ? "" : ": ",
              wrong.c_str());
  std::fflush(stdout);
}

[[noreturn]] void run_from(Progress& progress, const std::vector<Case>& cases) {
  for (; progress.at < cases.size(); ++progress.at) {
    alarm(kSeconds);
    std::string wrong;
    try {
      wrong = cases[progress.at].wrong();
    } catch (const std::exception& e) {
      wrong = e.what();
    }
    tell(progress, cases[progress.at], wrong);
  }
  std::_Exit(0);
}

std::string words_of(int status) {
  if (WIFSIGNALED(status) && WTERMSIG(status) == SIGALRM)
    return "it hangs: no end within " + std::to_string(kSeconds) + " s";
  if (WIFSIGNALED(status)) return std::string("its process ended by ") + strsignal(WTERMSIG(status));
  return "its process ended with status " + std::to_string(WEXITSTATUS(status)) + ", the words are above";
}

}  // namespace

int check_instructions() {
  const std::vector<Case> cases = all_cases();
  void* shared = mmap(nullptr, sizeof(Progress), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (shared == MAP_FAILED) {
    std::perror("mmap");
    return 2;
  }
  auto& progress = *new (shared) Progress{};
  while (progress.at < cases.size()) {
    const pid_t child = fork();
    if (child == 0) run_from(progress, cases);
    int status = 0;
    if (child < 0 || waitpid(child, &status, 0) != child) {
      std::perror("fork or waitpid");
      return 2;
    }
    if (progress.at >= cases.size()) break;
    tell(progress, cases[progress.at], words_of(status));
    ++progress.at;
  }
  return progress.failures != 0;
}

}  // namespace sm90_bench
