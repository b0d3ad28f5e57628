// One way for a job to go wrong, by name; abort_test.py starts it under mpirun and looks at what is left.

#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>

#include "parallel/runtime.h"
#include "parallel/watchdog.h"

namespace upmoe {
namespace {

void all_reduce_once(Communicator& world) {
  std::int32_t one = 1;
  world.all_reduce(host_view(&one, {1}), ReduceOp::kSum);
}

// Longer than the deadline, but with a heartbeat.
void stay_busy(std::chrono::seconds time) {
  const auto end = std::chrono::steady_clock::now() + time;
  while (std::chrono::steady_clock::now() < end) {
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    watchdog::heartbeat();
  }
}

void run(const std::string& mode, Communicator& world) {
  const bool bad = world.rank() == world.size() - 1;
  all_reduce_once(world);
  if (mode == "fine") return;
  if (mode == "exit" && bad) _exit(3);
  if (mode == "exit_zero" && bad) _exit(0);
  if (mode == "killed" && bad) raise(SIGKILL);
  if (mode == "segfault" && bad) raise(SIGSEGV);
  if (mode == "throw" && bad) fail(ExitCode::kBadInput, "shard 7 is torn");
  if (mode == "agreed")
    run_agreed(world, [&] {
      if (bad) fail(ExitCode::kNumeric, "loss is NaN in step 12");
    });
  if (mode == "leaves" && bad) return;  // and finalises MPI while the others communicate
  if (mode == "stopped" && bad) raise(SIGSTOP);
  if (mode == "hang" && bad) std::this_thread::sleep_for(std::chrono::hours(1));
  if (mode == "slow") stay_busy(std::chrono::seconds(4));
  if (mode == "works") {  // the last rank, the one before waits for it, and the others for that one
    const bool member = world.rank() >= world.size() - 2;
    const std::unique_ptr<Communicator> pair = world.split(member ? 1 : 0, world.rank());
    if (bad) stay_busy(std::chrono::seconds(5));
    if (member) all_reduce_once(*pair);
    all_reduce_once(world);
  }
  if (mode == "ring" && world.rank() < 2) {  // two ranks that wait for each other, after a while of work
    stay_busy(std::chrono::seconds(2));
    std::int32_t word = 0;
    world.recv(host_view(&word, {1}), 1 - world.rank());
  }
  // The last two ranks of the job, of which the last one stops; the others are busy.
  if (mode == "subgroup") {
    const bool member = world.rank() >= world.size() - 2;
    const std::unique_ptr<Communicator> pair = world.split(member ? 1 : 0, world.rank());
    if (bad) raise(SIGSTOP);
    if (!member) stay_busy(std::chrono::seconds(20));
    all_reduce_once(*pair);
  }
  std::vector<float> whole(static_cast<std::size_t>(world.size())), mine(1);
  world.all_gather(host_view(whole.data(), {world.size()}), host_view(mine.data(), {1})).wait();
}

int guarded(const std::string& mode, Runtime& runtime) {
  try {
    run(mode, runtime.world());
    return 0;
  } catch (const PeerError& e) {
    runtime.end_after_peer(static_cast<int>(e.code()));
  } catch (const Error& e) {
    runtime.abort(static_cast<int>(e.code()), e.what());
  }
}

}  // namespace
}  // namespace upmoe

int main(int argc, char** argv) {
  upmoe::Runtime runtime(&argc, &argv);
  if (argc != 2) return 2;
  upmoe::watchdog::start(std::chrono::milliseconds(3000), runtime.world().rank());
  const int status = upmoe::guarded(argv[1], runtime);
  upmoe::watchdog::stop();
  if (runtime.world().rank() == 0) std::puts("rank 0 came to its end");
  return status;
}
