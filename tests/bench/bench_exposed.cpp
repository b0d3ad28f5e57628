// How long a training step waits for communication, with the transfers under way beside the computation, and
// with every transfer waited for where it begins. Not a test.
//
// usage: mpirun -np N bench_exposed RUN.yaml STEPS ROUNDS [section.key=value ...]; prints one JSON object per
// mode and round, in turns, from rank 0: means over ranks of the median step. Sends between pipeline stages
// are left as they are: two stages that both wait for a send would wait for ever.

#include <fmt/ranges.h>

#include <algorithm>
#include <chrono>
#include <map>

#include "configs/model_config.h"
#include "parallel/runtime.h"
#include "tests/support/forwarding_communicator.h"
#include "trainer/trainer.h"

namespace upmoe {
namespace {

using Clock = std::chrono::steady_clock;

// Seconds that this rank stood still for others, by verb.
struct Waits {
  bool at_once = false;  // the mode: nothing stays under way
  std::map<std::string, double> seconds;
};

class TimedCommunicator final : public test::ForwardingCommunicator {
 public:
  TimedCommunicator(Communicator& inner, Waits& waits) : ForwardingCommunicator(inner), waits_(waits) {}
  TimedCommunicator(std::unique_ptr<Communicator> inner, Waits& waits)
      : ForwardingCommunicator(std::move(inner)), waits_(waits) {}

 private:
  void do_all_reduce(TensorView inout, ReduceOp op, Stream* stream) override {
    timed("all_reduce", [&] { inner().all_reduce(inout, op, stream); });
  }
  void do_broadcast(TensorView inout, int root, Stream* stream) override {
    timed("broadcast", [&] { inner().broadcast(inout, root, stream); });
  }
  void do_barrier() override {
    timed("barrier", [&] { inner().barrier(); });
  }
  Pending do_reduce_scatter(TensorView out, ConstTensorView in, Stream* stream) override {
    return begun("reduce_scatter", [&] { return inner().reduce_scatter(out, in, stream); });
  }
  Pending do_all_gather(TensorView out, ConstTensorView in, Stream* stream) override {
    return begun("all_gather", [&] { return inner().all_gather(out, in, stream); });
  }
  Pending do_all_to_all_rows(TensorView out, std::span<const std::int64_t> recv_rows, ConstTensorView in,
                             std::span<const std::int64_t> send_rows, Stream* stream) override {
    return begun("all_to_all_rows",
                 [&] { return inner().all_to_all_rows(out, recv_rows, in, send_rows, stream); });
  }
  void do_recv(std::span<const TensorView> out, int from, Stream* stream) override {
    timed("recv", [&] { inner().recv(out, from, stream); });
  }
  std::unique_ptr<Communicator> wrap(std::unique_ptr<Communicator> group) override {
    return std::make_unique<TimedCommunicator>(std::move(group), waits_);
  }
  template <class Verb>
  void timed(const char* verb, const Verb& run) {
    const auto start = Clock::now();
    run();
    waits_.seconds[verb] += std::chrono::duration<double>(Clock::now() - start).count();
  }
  template <class Verb>
  Pending begun(const char* verb, const Verb& run) {
    auto under_way = std::make_shared<Pending>();
    timed(verb, [&] { *under_way = run(); });
    const auto finish = [this, verb, under_way] { timed(verb, [&] { under_way->wait(); }); };
    if (!waits_.at_once) return Pending(finish);
    finish();
    return {};
  }
  Waits& waits_;
};

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2),
                   values.end());
  return values[values.size() / 2];
}

// `steps` steps after one to warm up.
void round(Trainer& trainer, Waits& waits, Communicator& world, int steps, std::int64_t& step) {
  std::vector<double> seconds, exposed;
  std::map<std::string, double> by_verb;
  trainer.step(++step);
  trainer.settle();
  for (int i = 0; i < steps; ++i) {
    waits.seconds.clear();
    const auto start = Clock::now();
    trainer.step(++step);
    trainer.settle();
    seconds.push_back(std::chrono::duration<double>(Clock::now() - start).count());
    exposed.push_back(0);
    for (const auto& [verb, s] : waits.seconds) {
      exposed.back() += s;
      by_verb[verb] += s / steps;
    }
  }
  double means[] = {median(seconds), median(exposed)};
  world.all_reduce(host_view(means, {2}), ReduceOp::kSum);
  if (world.rank() != 0) return;
  std::string verbs;
  for (const auto& [verb, s] : by_verb)
    verbs += fmt::format("{}\"{}\": {:.6f}", verbs.empty() ? "" : ", ", verb, s);
  fmt::print(
      "{{\"overlapped\": {}, \"step_s\": {:.6f}, \"exposed_s\": {:.6f}, \"rank_0_by_verb_s\": {{{}}}}}\n",
      !waits.at_once, means[0] / world.size(), means[1] / world.size(), verbs);
  std::fflush(stdout);
}

int run(int argc, char** argv, Communicator& world) {
  if (argc < 4) {
    fmt::print(stderr, "usage: bench_exposed RUN.yaml STEPS ROUNDS [section.key=value ...]\n");
    return static_cast<int>(ExitCode::kUsage);
  }
  const RunConfig config = read_run_config(argv[1], {argv + 4, argv + argc});
  Waits waits;
  TimedCommunicator timed(world, waits);
  Session s(config, read_model_config(config.model.path), timed);
  s.params.initialise(s.memory.exec, config.run.seed);
  s.optimizer.reset(s.memory.exec);
  s.open_data(0);
  Trainer trainer(s);
  std::int64_t step = 0;
  for (int i = 0; i < 2 * std::stoi(argv[3]); ++i) {
    waits.at_once = i % 2 == 1;
    round(trainer, waits, world, std::stoi(argv[2]), step);
  }
  return 0;
}

}  // namespace
}  // namespace upmoe

int main(int argc, char** argv) {
  upmoe::Runtime runtime(&argc, &argv);
  try {
    return upmoe::run(argc, argv, runtime.world());
  } catch (const upmoe::Error& e) {
    runtime.abort(static_cast<int>(e.code()), e.what());
  }
}
