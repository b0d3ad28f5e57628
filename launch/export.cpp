// upmoe export: a checkpoint (or any model) as a Hugging Face directory.

#include <algorithm>

#include "configs/families/family.h"
#include "configs/param_table.h"
#include "configs/router_record.h"
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

// What an export would lose, and its readers not notice.
void require_exportable(const ModelSource& source, const std::string& model) {
  const ModelConfig& config = source.config();
  std::string why = why_not_exported(config);
  const bool loses_biases = config.router_bias && !family_of(config).carries.has(Trait::kChoiceBias);
  for (int layer = 0; loses_biases && layer < config.num_hidden_layers && why.empty(); ++layer) {
    if (!config.is_moe_layer(layer)) continue;
    const ParamSpec bias = make_param(config, Role::kRouterBias, layer);
    std::vector<float> values(static_cast<std::size_t>(bias.shape.elements()));
    source.read(bias, whole(bias.shape), host_view(values.data(), bias.shape));
    if (std::any_of(values.begin(), values.end(), [](float v) { return v != 0; }))
      why = fmt::format("{} is not zero, and {} has no tensor for it: its readers would choose other experts",
                        bias.name, config.model_type);
  }
  if (!why.empty()) fail(ExitCode::kUsage, "{} cannot be exported: {}", model, why);
}

int run_export(const ExportArguments& a, Runtime& runtime) {
  Communicator& world = runtime.world();
  run_agreed(world, [&] {
    if (world.rank() != 0) return;  // one writer
    const std::unique_ptr<ModelSource> source = open_model(a.model);
    const auto read = [&](const ParamSpec& param, const Box& part, TensorView out) {
      source->read(param, part, out);
    };
    require_exportable(*source, a.model);
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
