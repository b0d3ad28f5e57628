// upmoe export: a checkpoint (or any model) as a Hugging Face directory; adapters in PEFT's form, or merged.

#include <algorithm>
#include <filesystem>
#include <set>

#include "configs/families/family.h"
#include "configs/lora_record.h"
#include "configs/param_table.h"
#include "configs/router_record.h"
#include "configs/run_choices.h"
#include "data/checkpoint_folder.h"
#include "data/finite_values.h"
#include "data/hf_model.h"
#include "data/hf_writer.h"
#include "data/merged_weights.h"
#include "data/model_source.h"
#include "data/peft_adapter.h"
#include "data/run_metadata.h"
#include "data/shard_store.h"
#include "data/staged_directory.h"
#include "kernels/core/log.h"
#include "launch/command_line.h"
#include "launch/commands.h"

namespace upmoe {

namespace {

namespace fs = std::filesystem;

struct ExportArguments {
  std::string model, to;
  Precision dtype = Precision::kBf16;
  bool dtype_given = false;
  bool adapter = false, merge = false;  // the model's own adapters: alone, or in its weights
  std::string merge_adapter;            // a folder of PEFT's to merge; empty: none
  bool other_base = false;              // whatever model that was trained beside
};

// What the output may not lie in: a run's checkpoints are one folder.
fs::path folder_of(const fs::path& model) {
  const fs::path above = resolved(model).parent_path();
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

// Adapters are neither forgotten nor looked for in vain.
void require_asked(const ExportArguments& a, const ModelConfig& config) {
  const bool own = a.adapter || a.merge;
  if (config.lora.given() && !own)
    fail(ExitCode::kUsage,
         "{} holds adapters ({}){}: --adapter writes them as "
         "PEFT does, --merge the model with them in its weights",
         a.model, words_of(config.lora),
         a.merge_adapter.empty() ? "" : ", which come before those of another folder");
  if (!config.lora.given() && own)
    fail(ExitCode::kUsage, "{}: {} holds no adapters", a.adapter ? "--adapter" : "--merge", a.model);
}

// The model beneath adapters: a run may have begun from another one's adapters, beside the same model.
RunMetadata beneath(RunMetadata run) {
  for (std::set<std::string> seen; seen.insert(run.source).second;) {
    if (!fs::is_directory(run.source)) return run;
    const fs::path folder = newest_if_run(run.source);
    if (!fs::exists(folder / "manifest.json") || !open_model(folder)->config().lora.given()) return run;
    run = run_metadata_of(ShardStore(folder));
  }
  return run;
}

// Adapters are written as they are trained, unless told otherwise; they are small.
void export_adapter(const ExportArguments& a, const ModelSource& source, const ReadTensor& read) {
  require_exportable(source, a.model);  // its readers put it beside a model with the family's routers
  const RunMetadata run = beneath(run_metadata_of(ShardStore(source.directory())));
  write_peft_adapter({.dir = a.to,
                      .inputs = {folder_of(source.directory())},
                      .dtype = a.dtype_given ? dtype_of(a.dtype) : DType::kF32,
                      .base = run.source,
                      .base_digest = run.source_digest.value_or("")},
                     source.config(), read);
  log::info("{} written: the adapters ({}) of {}", a.to, words_of(source.config().lora), a.model);
}

// Whether a folder may be the model that an adapter names, a path or a name on the hub: whose last part it has.
bool may_be(const fs::path& folder, const std::string& named) {
  const std::string last = fs::path(named).filename().string();
  return last.empty() || resolved(folder).string().find(last) != std::string::npos;
}

void require_own_base(const ExportArguments& a, const PeftAdapter& adapter, const ModelSource& source) {
  if (a.other_base) return;
  const bool has_digest = !adapter.base_digest().empty();
  const bool own =
      has_digest ? adapter.base_digest() == digest_of(source) : may_be(source.directory(), adapter.base());
  if (!own)
    fail(ExitCode::kBadInput,
         "{}: the adapter was trained beside {}, and {} is another model{}; give that one, or "
         "--other-base to merge it all the same",
         a.merge_adapter, adapter.base().empty() ? "another one" : adapter.base(), a.model,
         has_digest ? " by its weights" : " by its name");
}

void export_model(const ExportArguments& a, const ModelSource& source, const ModelConfig& config,
                  const ReadTensor& read) {
  require_exportable(source, a.model);
  const fs::path companions = source.companions();
  if (companions.empty())
    log::warning("{}: the model directory it was trained from is gone; no tokenizer files are carried along",
                 a.model);
  std::vector<fs::path> inputs{folder_of(source.directory())};
  if (!a.merge_adapter.empty()) inputs.emplace_back(a.merge_adapter);
  write_hf_model({.dir = a.to, .companions = companions, .inputs = inputs, .dtype = dtype_of(a.dtype)},
                 config,
                 finite_alone(config.lora.given() ? with_adapters_merged(config, read) : read, a.model));
  log::info("{} written in {}{}", a.to, name_of(a.dtype),
            config.lora.given() ? fmt::format(", with its adapters merged ({})", words_of(config.lora)) : "");
}

void export_on_one_rank(const ExportArguments& a) {
  const std::unique_ptr<ModelSource> source = open_model(a.model);
  require_asked(a, source->config());
  const ReadTensor read = [&](const ParamSpec& param, const Box& part, TensorView out) {
    source->read(param, part, out);
  };
  if (a.adapter) return export_adapter(a, *source, read);
  if (a.merge_adapter.empty()) return export_model(a, *source, source->config(), read);
  const PeftAdapter adapter(a.merge_adapter, source->config());
  require_own_base(a, adapter, *source);
  export_model(a, *source, adapter.config(), [&](const ParamSpec& param, const Box& part, TensorView out) {
    param.adapts ? adapter.read(param, part, out) : source->read(param, part, out);
  });
}

int run_export(const ExportArguments& a, Runtime& runtime) {
  Communicator& world = runtime.world();
  run_agreed(world, [&] {
    if (world.rank() == 0) export_on_one_rank(a);  // one writer
  });
  return 0;
}

}  // namespace

void add_export(CLI::App& app, Handler& handler) {
  auto a = std::make_shared<ExportArguments>();
  CLI::App* command = app.add_subcommand(
      "export", "Checkpoint to Hugging Face directory; adapters in PEFT's form, or merged");
  as_path(command->add_option("model", a->model, "Checkpoint, run directory or model directory")->required());
  as_path(command->add_option("--to", a->to, "Directory to write; must not exist or be empty")->required());
  CLI::Option* dtype =
      add_choice(*command, "--dtype", a->dtype, "bf16 or fp32; adapters are written in fp32 unless told");
  CLI::Option* adapter =
      command->add_flag("--adapter", a->adapter, "The adapters alone, as PEFT writes them");
  CLI::Option* merge =
      command->add_flag("--merge", a->merge, "The model with its adapters in its weights")->excludes(adapter);
  CLI::Option* folder =
      as_path(command->add_option("--merge-adapter", a->merge_adapter,
                                  "Folder with an adapter as PEFT writes it, to merge into the model"))
          ->excludes(adapter)
          ->excludes(merge);
  command
      ->add_flag("--other-base", a->other_base,
                 "Merge an adapter although it was trained beside another model of this shape")
      ->needs(folder);
  command->callback([a, dtype, &handler] {
    a->dtype_given = dtype->count() > 0;
    handler = [a](Runtime& runtime) { return run_export(*a, runtime); };
  });
}

}  // namespace upmoe
