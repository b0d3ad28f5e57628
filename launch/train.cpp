// upmoe train: reads the run's configuration and trains.

#include "configs/run_config.h"
#include "kernels/core/gpu.h"
#include "kernels/core/log.h"
#include "launch/commands.h"
#include "parallel/watchdog.h"
#include "trainer/session.h"
#include "trainer/stop_requests.h"
#include "trainer/training_run.h"

namespace upmoe {

namespace {

struct TrainArguments {
  std::string file;
  std::vector<std::string> overrides;
  bool fresh = false;
  double deadline_s = 600;
};

int run_train(const TrainArguments& arguments, Runtime& runtime) {
  log::start(runtime.world().rank(), runtime.world().size());
  RunConfig run;
  run_agreed(runtime.world(), [&] { run = read_run_config(arguments.file, arguments.overrides); });
  const Device device = runtime.choose_device(run.device);
  Communicator& world = runtime.world();
  if (device.type == DeviceType::kCuda && world.rank() == 0)
    log::info("computing on {} GPU{}: {}", world.size(), world.size() == 1 ? "" : "s",
              gpu::name_of(device.index));
  remark_on_precision(run.train.precision, device);
  install_signal_handlers();
  if (arguments.deadline_s > 0)
    watchdog::start(std::chrono::milliseconds(static_cast<std::int64_t>(arguments.deadline_s * 1000)),
                    world.rank());
  const int status = train(run, world, {device, arguments.fresh});
  watchdog::stop();
  return status;
}

}  // namespace

void add_train(CLI::App& app, Handler& handler) {
  auto arguments = std::make_shared<TrainArguments>();
  CLI::App* command =
      app.add_subcommand("train", "Train; resumes from the newest complete checkpoint of the run directory");
  command->add_option("run", arguments->file, "Run configuration (YAML)")->required();
  command->add_option("overrides", arguments->overrides, "section.key=value, e.g. train.steps=100");
  command->add_flag("--fresh", arguments->fresh, "Refuse to start when the run directory holds a checkpoint");
  command
      ->add_option("--deadline", arguments->deadline_s,
                   "Seconds without progress after which the job ends with status 70 (0: never)")
      ->capture_default_str();
  command->callback([arguments, &handler] {
    handler = [arguments](Runtime& runtime) { return run_train(*arguments, runtime); };
  });
}

}  // namespace upmoe
