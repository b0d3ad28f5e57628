#include "parallel/runtime.h"

#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <optional>
#include <thread>
#include <vector>

#include "kernels/core/gpu.h"
#include "kernels/core/log.h"
#include "kernels/core/philox.h"
#include "parallel/host.h"
#include "parallel/mpi_comm.h"
#include "parallel/nccl_comm.h"
#include "parallel/self_comm.h"
#include "parallel/watchdog.h"

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

// Not of a launcher that was started in a shell under srun.
bool by_srun(const Announced& announced) {
  return announced.variable != "OMPI_COMM_WORLD_SIZE" && std::getenv("SLURM_STEP_ID") != nullptr &&
         positive("SLURM_STEP_NUM_TASKS") == announced.ranks;
}

// Open MPI then ends every rank with the advice to build another one, which is not what is wrong. It is said before
// and ends nothing here: another MPI may have a way of its own.
void warn_of_srun() {
  if (std::getenv("PMIX_NAMESPACE") != nullptr || announced_rank() != 0) return;
  const char* offered = std::getenv("SLURM_MPI_TYPE");
  log::warning(
      "srun tells the ranks of each other by '{}', and Open MPI wants PMIx: if it ends them now, start them "
      "by srun --mpi=pmix",
      offered != nullptr ? offered : "none");
}

std::unique_ptr<Communicator> join_ranks(const Announced& announced, int* argc, char*** argv) {
  const bool srun = by_srun(announced);
  if (srun) warn_of_srun();
  const MpiWorld mpi = start_mpi(argc, argv);
  mpi_started = true;
  if (mpi.size != announced.ranks)
    fail(ExitCode::kUsage,
         "{} says {} ranks, but MPI says {}: the launcher belongs to another MPI than this program, so each "
         "process believes it is alone; start it with {}",
         announced.variable, announced.ranks, mpi.size,
         srun ? "srun --mpi=pmix, as launch/run_slurm.sbatch does"
              : "the mpirun of the MPI it was built with");
  return make_mpi_communicator();
}

}  // namespace

int announced_rank() {
  for (const char* name : {"OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK", "SLURM_PROCID"})
    if (const char* text = std::getenv(name)) return std::atoi(text);
  return 0;
}

Runtime::Runtime(int* argc, char*** argv, std::chrono::milliseconds deadline) {
  bound_spinning();
  // A program started alone never calls MPI: it would want its library's set-up, and a single rank has nobody to talk
  // to.
  const Announced announced = announced_ranks();
  const bool alone = announced.ranks == 1;
  if (deadline.count() > 0) watchdog::start(deadline, alone ? 0 : announced_rank());
  world_ = alone ? make_self_communicator() : join_ranks(announced, argc, argv);
  cores_ = share_cores(*world_);
}

namespace {

// Takes the GPU that has this rank's number among the ranks of its host; a launcher that shows each process
// its own GPU alone has chosen already.
// Two ranks that were shown one GPU each, both number 0, may have been shown the same one: the PCI address tells,
// together with the host's number, as addresses repeat from host to host.
int take_gpu(Communicator& world) {
  const std::vector<std::int64_t> hosts = hosts_of(world);
  const auto me = hosts.begin() + world.rank();
  const auto local = static_cast<int>(std::count(hosts.begin(), me, *me));
  const int index = gpu::count() == 1 ? 0 : local;
  std::int64_t hardware = 0;
  run_agreed(world, [&] {
    gpu::use(index);
    hardware = static_cast<std::int64_t>(philox_key(static_cast<std::uint64_t>(*me), gpu::pci_id(index)));
  });
  const std::vector<std::int64_t> all = gather(world, hardware);
  const auto other = std::find(all.begin(), all.end(), hardware);
  const bool shared = other - all.begin() != world.rank();
  agree(world, ExitCode::kDevice,
        shared ? fmt::format("ranks {} and {} have the same GPU (PCI {}): start "
                             "at most as many ranks on a host as it has GPUs",
                             other - all.begin(), world.rank(), gpu::pci_id(index))
               : "");
  return index;
}

}  // namespace

Device Runtime::choose_device(DeviceChoice wish) {
  if (wish == DeviceChoice::kCpu) return {};
  const bool have = gpu::count() > 0;
  const std::vector<std::int64_t> all = gather(*world_, have ? 1 : 0);
  const auto without = std::find(all.begin(), all.end(), 0);
  if (without != all.end()) {
    if (wish == DeviceChoice::kAuto && std::find(all.begin(), all.end(), 1) == all.end()) return {};
    const bool speaks = without - all.begin() == world_->rank();
    const char* advice = wish == DeviceChoice::kAuto
                             ? "other ranks have GPUs, and all compute on one kind of device: set device: "
                               "cpu, or leave this host out"
                             : "set device: cpu or auto";
    agree(*world_, ExitCode::kDevice,
          speaks ? fmt::format("device: {} was asked for, but {}; {}", name_of(wish), gpu::why_none(), advice)
                 : "");
  }
  const Device device{DeviceType::kCuda, take_gpu(*world_)};
  if (world_->size() > 1) world_ = make_nccl_communicator(std::move(world_));
  return device;
}

Runtime::~Runtime() {
  world_.reset();
  if (mpi_started && std::uncaught_exceptions() == 0) stop_mpi();
  watchdog::stop();
}

void Runtime::abort(int code, const std::string& message) noexcept {
  watchdog::stop();  // from here on there is a cause, and no second message
  const bool several = world_ != nullptr && world_->size() > 1;
  // Ranks often meet the same error in the same moment (a loss that is not finite): the lowest one speaks and
  // ends the job, by a signal that is no request to save any more, before the others do.
  std::signal(SIGTERM, SIG_DFL);
  if (several && world_->rank() > 0) std::this_thread::sleep_for(std::chrono::milliseconds(1500));
  if (several) {
    std::fprintf(stderr, "%supmoe: error: rank %d: %s\n", log::timestamp().c_str(), world_->rank(),
                 message.c_str());
  } else {
    std::fprintf(stderr, "%supmoe: error: %s\n", log::timestamp().c_str(), message.c_str());
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
