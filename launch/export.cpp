// upmoe export: a checkpoint (or any model) as a Hugging Face directory.

#include "configs/run_choices.h"
#include "data/hf_model.h"
#include "data/hf_writer.h"
#include "data/model_source.h"
#include "data/staged_directory.h"
#include "kernels/core/log.h"
#include "launch/command_line.h"
#include "launch/commands.h"

namespace upmoe {

namespace {

struct ExportArguments {
  std::string model, to;
  Precision dtype = Precision::kBf16;
};

// What the output may not lie in: a run's checkpoints are one folder.
std::filesystem::path folder_of(const std::filesystem::path& model) {
  const std::filesystem::path above = resolved(model).parent_path();
  return above.filename() == "checkpoints" ? above : model;
}

int run_export(const ExportArguments& a, Runtime& runtime) {
  Communicator& world = runtime.world();
  run_agreed(world, [&] {
    if (world.rank() != 0) return;  // one writer
    const std::unique_ptr<ModelSource> source = open_model(a.model);
    const auto read = [&](const ParamSpec& param, const Box& part, TensorView out) {
      source->read(param, part, out);
    };
    const std::filesystem::path companions = source->companions();
    if (companions.empty())
      log::warning(
          "{}: the model directory it was trained from is gone; no tokenizer files are carried along",
          a.model);
    write_hf_model({.dir = a.to,
                    .companions = companions,
                    .inputs = {folder_of(source->directory())},
                    .dtype = dtype_of(a.dtype)},
                   source->config(), read);
    log::info("{} written in {}", a.to, name_of(a.dtype));
  });
  return 0;
}

}  // namespace

void add_export(CLI::App& app, Handler& handler) {
  auto a = std::make_shared<ExportArguments>();
  CLI::App* command = app.add_subcommand("export", "Checkpoint to Hugging Face directory");
  as_path(command->add_option("model", a->model, "Checkpoint, run directory or model directory")->required());
  as_path(command->add_option("--to", a->to, "Directory to write; must not exist or be empty")->required());
  add_choice(*command, "--dtype", a->dtype, "bf16 or fp32");
  command->callback([a, &handler] { handler = [a](Runtime& runtime) { return run_export(*a, runtime); }; });
}

}  // namespace upmoe
