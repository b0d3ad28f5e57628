// upmoe plan: what a run will take of memory, time and links on any number of ranks, before it starts.

#include <filesystem>

#include "configs/run_notes.h"
#include "configs/shipped_file.h"
#include "configs/trained_model.h"
#include "data/model_source.h"
#include "kernels/core/log.h"
#include "launch/command_line.h"
#include "launch/commands.h"
#include "launch/output.h"
#include "launch/plan_report.h"
#include "launch/shipped.h"
#include "trainer/teacher.h"

namespace upmoe {

namespace {

namespace fs = std::filesystem;

constexpr const char* kThisMachine = "this";  // what `upmoe doctor --measure` is told to write

struct PlanArguments {
  std::string file, machine;
  std::vector<std::string> overrides;
  int world = 1;
  bool search = false, as_json = false;
};

std::optional<Machine> machine_of(const PlanArguments& a) {
  if (!a.machine.empty()) return read_machine(shipped_or_own(kMachines, a.machine));
  const fs::path own = kMachines.folder / (std::string(kThisMachine) + kMachines.suffix);
  if (fs::exists(own)) return read_machine(own);
  return std::nullopt;
}

PlanReport report_of(const PlanArguments& a) {
  RunConfig run = read_run_config(a.file, a.overrides);
  read_teacher(run);
  const ModelConfig model = trained_model(run, config_of_model(run.model.path));
  const std::optional<Machine> machine = machine_of(a);
  PlanRequest request;
  request.run = a.file;
  if (machine) request.machine = machine->name;
  if (a.search) {
    if (!machine)
      fail(ExitCode::kUsage,
           "upmoe plan: --search ranks layouts by their time, which needs a machine: --machine FILE, or a "
           "name of configs/machines");
    return search_report(request, a.world, search_layouts(run, model, a.world, *machine));
  }
  request.beside_published = model.num_moe_layers() > 0 && run.train.precision == Precision::kBf16;
  request.notes = words_of_ranks_without_experts(run, model);
  const RunPlan plan = plan_run(run, model, a.world, machine);
  return plan_report(request, plan,
                     machine ? helpful_changes(run, model, plan, *machine) : std::vector<Change>{});
}

int run_plan(const PlanArguments& a, Runtime& runtime) {
  run_agreed(runtime.world(), [&] {
    if (runtime.world().rank() != 0) return;
    const PlanReport report = report_of(a);
    print_result(a.as_json ? report.json : report.text);
  });
  return 0;
}

}  // namespace

void add_plan(CLI::App& app, Handler& handler) {
  auto a = std::make_shared<PlanArguments>();
  CLI::App* command =
      app.add_subcommand("plan", "Memory, time and bytes of a run on any number of ranks, before it starts");
  as_path(command->add_option("run", a->file, "Run configuration (YAML)")->required());
  command->add_option("overrides", a->overrides,
                      "section.key=value, e.g. parallel.ep=8; the last of two counts");
  command->add_option("--world", a->world, "Ranks")->check(CLI::Range(1, 1 << 16))->required();
  as_path(command->add_option(
      "--machine", a->machine,
      "Machine: a file, or a name of configs/machines (default: this, where doctor has written it)"));
  command->add_flag("--search", a->search, "The fastest layouts of these ranks, instead of the run's own");
  command->add_flag("--json", a->as_json, "JSON on standard output");
  command->callback([a, &handler] { handler = [a](Runtime& runtime) { return run_plan(*a, runtime); }; });
}

}  // namespace upmoe
