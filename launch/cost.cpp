// upmoe cost: what models cost to train and to serve, what was printed about it, and what runs have spent.

#include "configs/shipped_file.h"
#include "kernels/core/log.h"
#include "launch/commands.h"
#include "launch/cost_comparison.h"
#include "launch/cost_request.h"
#include "launch/output.h"
#include "launch/shipped.h"

namespace upmoe {

namespace {

namespace fs = std::filesystem;

CostReport cost_of_models(const CostRequest& a) {
  std::vector<NamedCost> costs;
  for (const std::string& given : a.models) {
    const ModelConfig model = shape_of_model(given);
    if (a.seq_len > model.max_position_embeddings)
      log::warning("--seq-len {}: {} was made for {} positions", a.seq_len, given,
                   model.max_position_embeddings);
    costs.push_back({name_of_model(given), model_cost(model, {a.seq_len, a.recompute})});
  }
  TrainingLength training;
  training.mfu = a.mfu;
  if (a.tokens > 0) training.tokens = a.tokens;
  if (!a.machine.empty()) training.machine = read_machine(shipped_or_own(kMachines, a.machine));
  return models_report(costs, a.recompute, training);
}

CostReport cost_as_published(const CostRequest& a) {
  std::vector<PublishedRow> rows;
  for (const PublishedModel& p : published_models()) {
    const fs::path file = kModels.folder / (std::string(p.file) + kModels.suffix);
    if (fs::exists(file)) rows.push_back({&p, model_cost(read_model_config(file), {.seq_len = a.seq_len})});
  }
  return published_report(rows);
}

std::optional<RunCurve> source_of(const CostRequest& a) {
  if (a.sources.empty()) return std::nullopt;
  return read_run_curve(a.sources.front());
}

CostReport cost_as_claimed(const CostRequest& a) {
  std::vector<ClaimedModels> by_length;
  for (const std::int64_t seq_len : {2048, 4096, 8192, 32768}) {
    const auto cost = [&](const char* name) {
      return model_cost(shape_of_model(name), {.seq_len = seq_len});
    };
    by_length.push_back({cost("qwen1.5-moe-a2.7b"), cost("qwen1.5-7b"), cost("qwen1.5-1.8b")});
  }
  const auto counts = [](const char* name) { return count_weights(shape_of_model(name)).parameters; };
  std::optional<MeasuredClaim> measured;
  if (!a.runs.empty()) {
    const std::vector<RunCurve> runs = read_run_curves(a.runs);
    measured = measured_claim(runs.at(0), runs.at(1), source_of(a));
  }
  return claim_report(claim_readings(by_length, {}), measured,
                      card_readings(counts("marco-nano"), counts("qwen3-0.6b"), {}));
}

CostReport cost_of_runs(const CostRequest& a) {
  return runs_report(read_run_curves(a.runs), source_of(a));
}

CostReport fit_of_runs(const CostRequest& a) {
  std::vector<RunCurve> sources;
  for (const std::string& source : a.sources) sources.push_back(read_run_curve(source));
  const std::vector<RunCurve> runs = read_run_curves(a.fitted);
  std::vector<RunOutcome> outcomes;
  for (std::size_t i = 0; i < runs.size(); ++i) {
    const RunCurve* source = sources.empty() ? nullptr : &sources[sources.size() == 1 ? 0 : i];
    outcomes.push_back(outcome_of(runs[i], source));
  }
  return fit_report(outcomes, fit_scaling(outcomes));
}

CostReport cost_of_serving(const CostRequest& a) {
  const Request request{a.prompt, a.output};
  const auto served = [&](std::size_t i, const char* otherwise) {
    const std::string given = a.models.empty() ? otherwise : a.models[i];
    return Served{name_of_model(given), ServedModel(shape_of_model(given), request.prompt)};
  };
  const std::string machine = a.machine.empty() ? "a100-80" : a.machine;
  return inference_report(served(0, "qwen1.5-moe-a2.7b"), served(1, "qwen1.5-7b"),
                          read_machine(shipped_or_own(kMachines, machine)), request);
}

CostReport report_of(const CostRequest& a) {
  switch (a.kind) {
    case CostKind::kModels:
      return cost_of_models(a);
    case CostKind::kPublished:
      return cost_as_published(a);
    case CostKind::kClaim:
      return cost_as_claimed(a);
    case CostKind::kRuns:
      return cost_of_runs(a);
    case CostKind::kFit:
      return fit_of_runs(a);
    case CostKind::kInference:
      return cost_of_serving(a);
  }
  fail(ExitCode::kFailure, "no such report");
}

int run_cost(const CostRequest& a, Runtime& runtime) {
  run_agreed(runtime.world(), [&] {
    if (runtime.world().rank() != 0) return;
    const CostReport report = report_of(a);
    print_result(a.as_json ? report.json : report.text);
  });
  return 0;
}

}  // namespace

void add_cost(CLI::App& app, Handler& handler) {
  CLI::App* command =
      app.add_subcommand("cost", "What models cost to train and to serve, and what runs have spent");
  const std::shared_ptr<CostRequest> a = add_cost_options(*command);
  command->callback([command, a, &handler] {
    settle_cost_request(*command, *a);
    handler = [a](Runtime& runtime) { return run_cost(*a, runtime); };
  });
}

}  // namespace upmoe
