// upmoe train: reads the run's configuration and trains.

#include "configs/run_config.h"
#include "kernels/core/gpu.h"
#include "kernels/core/log.h"
#include "launch/command_line.h"
#include "launch/commands.h"
#include "trainer/diagnosis/host_facts.h"
#include "trainer/diagnosis/warnings.h"
#include "trainer/rank_model.h"
#include "trainer/stop_requests.h"
#include "trainer/training_run.h"

namespace upmoe {

namespace {

struct TrainArguments {
  std::string file;
  std::vector<std::string> overrides;
  bool fresh = false;
};

// In words, what rank 0 computes on.
std::string machine_of(const Device& device) {
  const HostFacts host = read_host();
  const std::string processor = fmt::format(
      "{}, {:.0f} GiB", host.processor.empty() ? "a processor" : host.processor, host.memory / (1 << 30));
  return device.type == DeviceType::kCuda
             ? fmt::format("{}; the host: {}", gpu::name_of(device.index), processor)
             : processor;
}

int run_train(const TrainArguments& arguments, Runtime& runtime) {
  RunConfig run;
  run_agreed(runtime.world(), [&] { run = read_run_config(arguments.file, arguments.overrides); });
  const Device device = runtime.choose_device(run.device);
  Communicator& world = runtime.world();
  if (device.type == DeviceType::kCuda && world.rank() == 0)
    log::info("computing on {} GPU{}: {}", world.size(), world.size() == 1 ? "" : "s",
              gpu::name_of(device.index));
  remark_on_precision(run.train.precision, device);
  warn_of_machine(world, run.run.dir);
  const RunOrigin origin{command_of_this_process(), UPMOE_VERSION, commit_of_this_program(),
                         machine_of(device), surroundings_of(world).hosts};
  return train(run, world, {device, arguments.fresh, describe(runtime.cores()), origin});
}

}  // namespace

void add_train(CLI::App& app, Handler& handler) {
  auto arguments = std::make_shared<TrainArguments>();
  CLI::App* command =
      app.add_subcommand("train", "Train; resumes from the newest complete checkpoint of the run directory");
  as_path(command->add_option("run", arguments->file, "Run configuration (YAML)")->required());
  command->add_option("overrides", arguments->overrides,
                      "section.key=value, e.g. train.steps=100; the last of two counts");
  command->footer([] {
    return "Keys of the run configuration, section.key = default [type], each also as section.key=value "
           "on the command line.\nIn paths ~ is the home folder and ${NAME} a variable of the "
           "environment.\n\n" +
           run_config_help();
  });
  command->add_flag("--fresh", arguments->fresh, "Refuse to start when the run directory holds a checkpoint");
  command->callback([arguments, &handler] {
    install_signal_handlers();  // before the ranks are up: a request that comes early must not kill
    handler = [arguments](Runtime& runtime) { return run_train(*arguments, runtime); };
  });
}

}  // namespace upmoe
