#include "parallel/runtime.h"

#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <optional>
#include <thread>

#include "parallel/mpi_comm.h"

namespace upmoe {

namespace {

// The number of ranks a launcher announced, and the variable that said so. OMPI before SLURM: under mpirun
// inside a batch script SLURM_NTASKS speaks of the allocation. A Slurm shell without a step is one process.
struct Announced {
  int ranks = 1;
  std::string variable;
};

std::optional<int> positive(const char* name) {
  const char* text = std::getenv(name);
  if (text == nullptr) return std::nullopt;
  char* end = nullptr;
  const long n = std::strtol(text, &end, 10);
  if (end == text || *end != 0 || n < 1 || n > 1'000'000)
    fail(ExitCode::kUsage, "environment variable {}: found '{}', expected a number of ranks", name, text);
  return static_cast<int>(n);
}

Announced announced_ranks() {
  for (const char* name : {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"})
    if (const auto n = positive(name)) return {*n, name};
  if (std::getenv("SLURM_STEP_ID") != nullptr && std::getenv("SLURM_PROCID") != nullptr)
    if (const auto n = positive("SLURM_STEP_NUM_TASKS")) return {*n, "SLURM_STEP_NUM_TASKS"};
  return {};
}

bool mpi_started = false;

}  // namespace

Runtime::Runtime(int* argc, char*** argv) {
  const Announced announced = announced_ranks();
  if (announced.ranks == 1) {
    world_ = make_self_communicator();
    return;
  }
  const MpiWorld mpi = start_mpi(argc, argv);
  mpi_started = true;
  if (mpi.size != announced.ranks)
    fail(ExitCode::kUsage,
         "{} says {} ranks, but MPI says {}: the launcher belongs to another MPI than this program, so each "
         "process believes "
         "it is alone; start it with the mpirun of the MPI it was built with",
         announced.variable, announced.ranks, mpi.size);
  world_ = make_mpi_communicator();
}

Runtime::~Runtime() {
  world_.reset();
  if (mpi_started && std::uncaught_exceptions() == 0) stop_mpi();
}

void Runtime::abort(int code, const std::string& message) noexcept {
  watchdog::stop();  // from here on there is a cause, and no second message
  const bool several = world_ != nullptr && world_->size() > 1;
  // Ranks often meet the same error in the same moment (a loss that is not finite): the lowest one speaks and
  // ends the job, by a signal that is no request to save any more, before the others do.
  std::signal(SIGTERM, SIG_DFL);
  if (several && world_->rank() > 0) std::this_thread::sleep_for(std::chrono::milliseconds(1500));
  if (several) {
    std::fprintf(stderr, "upmoe: error: rank %d: %s\n", world_->rank(), message.c_str());
  } else {
    std::fprintf(stderr, "upmoe: error: %s\n", message.c_str());
  }
  std::fflush(stderr);
  std::fflush(stdout);
  if (several) abort_mpi(code);
  _exit(code);
}

void Runtime::end_after_peer(int code) noexcept {
  watchdog::stop();
  std::fflush(stdout);
  if (world_->size() == 1) _exit(code);
  std::this_thread::sleep_for(std::chrono::seconds(5));  // the peer's abort ends this process long before
  abort_mpi(code);
}

}  // namespace upmoe
