// Trains like `upmoe train`, but one rank dies or stops in a chosen phase of a chosen step; fault_test.py
// starts it and looks at what is left.
//
// When it does, the run directory gets a file `struck`: the moment from which the others' time counts.
//
// usage: fault_ranks RUN.yaml PHASE kill|stop RANK STEP DEADLINE_MS [section.key=value ...]
// PHASE: forward | exchange | backward | reduce | optimizer | save (of the checkpoint of STEP)

#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <thread>

#include "kernels/core/log.h"
#include "parallel/runtime.h"
#include "parallel/watchdog.h"
#include "tests/support/forwarding_communicator.h"
#include "trainer/stop_requests.h"
#include "trainer/training_run.h"

namespace upmoe {
namespace {

struct Fault {
  std::string phase;
  int signal = SIGKILL;
  bool mine = false;  // this rank has it
  std::int64_t step = 0;
  std::filesystem::path run_dir;
  // Where this rank is, by the verbs it has called. A step ends with the sum of squared gradients: one fp64.
  std::int64_t current_step = 1;
  bool exchanged = false, reduced = false;  // in this step: rows of experts, gradients

  void strike() const {
    std::ofstream(run_dir / "struck").close();
    kill(getpid(), signal);
  }
  void strike(const char* here) const {
    if (mine && phase == here && current_step == step) strike();
  }
};

class FaultyCommunicator final : public test::ForwardingCommunicator {
 public:
  FaultyCommunicator(Communicator& inner, Fault& fault) : ForwardingCommunicator(inner), fault_(fault) {}
  FaultyCommunicator(std::unique_ptr<Communicator> inner, Fault& fault)
      : ForwardingCommunicator(std::move(inner)), fault_(fault) {}

 private:
  void do_all_reduce(TensorView inout, ReduceOp op, Stream* stream) override {
    ForwardingCommunicator::do_all_reduce(inout, op, stream);
    if (!fault_.reduced || inout.dtype != DType::kF64 || inout.elements() != 1) return;
    fault_.strike("optimizer");
    ++fault_.current_step;
    fault_.exchanged = fault_.reduced = false;
  }
  Pending do_reduce_scatter(TensorView out, ConstTensorView in, Stream* stream) override {
    Pending under_way = ForwardingCommunicator::do_reduce_scatter(out, in, stream);
    fault_.reduced = true;
    fault_.strike("reduce");
    return under_way;
  }
  Pending do_all_to_all_rows(TensorView out, std::span<const std::int64_t> recv_rows, ConstTensorView in,
                             std::span<const std::int64_t> send_rows, Stream* stream) override {
    if (!fault_.exchanged) fault_.strike("forward");
    if (fault_.reduced) fault_.strike("backward");  // the last block's gradients are on their way already
    Pending under_way = ForwardingCommunicator::do_all_to_all_rows(out, recv_rows, in, send_rows, stream);
    if (!fault_.exchanged) fault_.strike("exchange");
    fault_.exchanged = true;
    return under_way;
  }
  std::unique_ptr<Communicator> wrap(std::unique_ptr<Communicator> group) override {
    return std::make_unique<FaultyCommunicator>(std::move(group), fault_);
  }
  Fault& fault_;
};

// Strikes while this rank's part of the step's checkpoint is being written.
std::jthread watch_for_saving(const Fault& fault, int rank) {
  const std::filesystem::path shard = fault.run_dir / "checkpoints" /
                                      fmt::format("step_{:08}.tmp", fault.step) /
                                      fmt::format("shard_{:05}.h5", rank);
  return std::jthread([shard, &fault](const std::stop_token& stop) {
    while (!stop.stop_requested()) {
      if (std::filesystem::exists(shard)) fault.strike();
      std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
  });
}

int run(int argc, char** argv, Communicator& world) {
  if (argc < 7)
    fail(ExitCode::kUsage, "RUN.yaml PHASE kill|stop RANK STEP DEADLINE_MS [section.key=value ...]");
  log::start(world.rank());
  const RunConfig config = read_run_config(argv[1], {argv + 7, argv + argc});
  Fault fault;
  fault.phase = argv[2];
  fault.signal = argv[3] == std::string("stop") ? SIGSTOP : SIGKILL;
  fault.mine = world.rank() == std::stoi(argv[4]);
  fault.step = std::stoll(argv[5]);
  fault.run_dir = config.run.dir;
  install_signal_handlers();
  watchdog::start(std::chrono::milliseconds(std::stoi(argv[6])), world.rank());
  std::jthread saving;
  if (fault.mine && fault.phase == "save") saving = watch_for_saving(fault, world.rank());
  FaultyCommunicator faulty(world, fault);
  const int status = train(config, faulty, {});
  watchdog::stop();
  return status;
}

}  // namespace
}  // namespace upmoe

int main(int argc, char** argv) {
  upmoe::Runtime runtime(&argc, &argv);
  try {
    return upmoe::run(argc, argv, runtime.world());
  } catch (const upmoe::PeerError& e) {
    runtime.end_after_peer(static_cast<int>(e.code()));
  } catch (const upmoe::Error& e) {
    runtime.abort(static_cast<int>(e.code()), e.what());
  }
}
