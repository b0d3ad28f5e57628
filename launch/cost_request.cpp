#include "launch/cost_request.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstdlib>

#include "kernels/core/check.h"
#include "launch/command_line.h"

namespace upmoe {

namespace {

struct Report {
  CostKind kind;
  const char* asked_by;
  std::vector<std::string> takes;
};

const std::vector<Report>& reports() {
  static const std::vector<Report> all{
      {CostKind::kModels, "MODEL", {"MODEL", "--seq-len", "--tokens", "--machine", "--mfu", "--recompute"}},
      {CostKind::kPublished, "--published", {"--published", "--seq-len"}},
      {CostKind::kClaim, "--claim", {"--claim", "--run", "--source"}},
      {CostKind::kRuns, "--run", {"--run", "--source"}},
      {CostKind::kFit, "--fit", {"--fit", "--source"}},
      {CostKind::kInference, "--inference", {"--inference", "MODEL", "--machine", "--in", "--out"}}};
  return all;
}

bool takes(const Report& report, const std::string& option) {
  return std::find(report.takes.begin(), report.takes.end(), option) != report.takes.end();
}

// Of the options that say what is asked, those that were given; `MODEL` for models.
std::vector<std::string> given_options(const CLI::App& command) {
  std::vector<std::string> given;
  for (const CLI::Option* option : command.get_options()) {
    const std::string name = option->get_positional() ? "MODEL" : "--" + option->get_lnames().front();
    if (option->count() > 0 && name != "--json" && name != "--help") given.push_back(name);
  }
  return given;
}

[[noreturn]] void refuse(const Report& report, const std::string& option) {
  std::vector<std::string> with;
  for (const Report& other : reports())
    if (takes(other, option)) with.emplace_back(other.asked_by);
  fail(ExitCode::kUsage, "upmoe cost: {} does not go with {}; it goes with {}", option, report.asked_by,
       fmt::join(with, " or "));
}

const Report& report_of(const std::vector<std::string>& given) {
  const auto asks = [&](const Report& r) {
    return std::find(given.begin(), given.end(), r.asked_by) != given.end();
  };
  // What asks for a report may also be part of another one, that was asked for.
  const auto is_part = [&](const Report& r) {
    return std::any_of(reports().begin(), reports().end(), [&](const Report& other) {
      return &other != &r && asks(other) && takes(other, r.asked_by);
    });
  };
  std::vector<const Report*> asked;
  for (const Report& r : reports())
    if (r.kind != CostKind::kModels && asks(r) && !is_part(r)) asked.push_back(&r);
  if (asked.size() > 1)
    fail(ExitCode::kUsage, "upmoe cost: {} and {} are two reports; ask for one of them", asked[0]->asked_by,
         asked[1]->asked_by);
  if (!asked.empty()) return *asked.front();
  const Report& models = reports().front();
  if (!asks(models))
    fail(ExitCode::kUsage,
         "upmoe cost: {} says nothing alone; give a MODEL, or --published, --claim, --run, --fit or "
         "--inference",
         given.front());
  return models;
}

// "3e12", "2.2T", "500B".
std::string plain_number(const std::string& written) {
  char* end = nullptr;
  const double value = std::strtod(written.c_str(), &end);
  const std::string unit = end;
  constexpr std::pair<const char*, double> kUnits[] = {
      {"", 1}, {"K", 1e3}, {"M", 1e6}, {"B", 1e9}, {"T", 1e12}};
  for (const auto& [name, factor] : kUnits)
    if (end != written.c_str() && unit == name && std::isfinite(value) && value > 0)
      return fmt::format("{:.17g}", value * factor);
  throw CLI::ValidationError(
      fmt::format("found '{}', expected a number above 0 such as 3e12, 500B or 2.2T", written));
}

}  // namespace

std::shared_ptr<CostRequest> add_cost_options(CLI::App& command) {
  auto r = std::make_shared<CostRequest>();
  as_path(command.add_option(
      "model", r->models,
      "Models: a config.json, a directory with one, a checkpoint, or a name of configs/models"));
  command.add_option("--seq-len", r->seq_len, "Tokens per sequence")
      ->check(above_zero())
      ->capture_default_str();
  command
      .add_option("--tokens", r->tokens,
                  "Tokens of a training, such as 2.2T: its FLOPs, and with --machine its hours")
      ->transform(CLI::Validator(
          [](std::string& text) {
            text = plain_number(text);
            return std::string();
          },
          ""));
  as_path(command.add_option("--machine", r->machine,
                             "Device: a file, or a name of configs/machines (--inference: default a100-80)"));
  command.add_option("--mfu", r->mfu, "Share of the machine's peak that training reaches")
      ->check(CLI::Range(0.001, 1.0))
      ->capture_default_str();
  add_choice(command, "--recompute", r->recompute, "What backward computes again: as train.recompute");
  as_path(command.add_option(
      "--run", r->runs,
      "Runs of `upmoe train`, by directory: what each needs to reach the others' loss. With --claim: a "
      "mixture's and a dense model's, whose measured saving stands among the readings"));
  as_path(command.add_option(
      "--fit", r->fitted,
      "Runs of `upmoe train`, by directory: a law of their final losses by size and tokens, with residuals"));
  as_path(command.add_option(
      "--source", r->sources,
      "With --run: the run that made the first one's dense source, charged to it as well. With --fit: the "
      "source's run of each, in order, or one of all; the law is then of tokens before and after upcycling"));
  const auto flag = [&](const char* name, const std::string& description) {
    command.add_flag(name, description);
  };
  flag("--published", "Known models as computed, beside what was printed about them");
  flag("--claim", "75 % less training cost than Qwen1.5-7B: every reading of it");
  flag("--inference",
       "Best times to serve two models (default: qwen1.5-moe-a2.7b and qwen1.5-7b), by batch size");
  const auto tokens_of_request = [&](const char* name, std::int64_t& tokens, const char* description) {
    command.add_option(name, tokens, description)->check(above_zero())->capture_default_str();
  };
  tokens_of_request("--in", r->prompt, "With --inference: tokens of a request's prompt");
  tokens_of_request("--out", r->output, "With --inference: tokens of its answer");
  command.add_flag("--json", r->as_json, "JSON on standard output");
  return r;
}

void settle_cost_request(const CLI::App& command, CostRequest& r) {
  const std::vector<std::string> given = given_options(command);
  if (given.empty()) throw CLI::CallForHelp();
  const Report& report = report_of(given);
  r.kind = report.kind;
  for (const std::string& option : given)
    if (!takes(report, option)) refuse(report, option);
  if (r.kind == CostKind::kInference && !r.models.empty() && r.models.size() != 2)
    fail(ExitCode::kUsage, "upmoe cost: --inference compares two models, found {}", r.models.size());
  if (r.kind == CostKind::kClaim && r.runs.empty() && !r.sources.empty())
    fail(ExitCode::kUsage, "upmoe cost: --source is charged to a run: give --run MIXTURE DENSE");
  if (r.kind == CostKind::kClaim && !r.runs.empty() && r.runs.size() != 2)
    fail(ExitCode::kUsage, "upmoe cost: --claim takes two runs, --run MIXTURE DENSE, found {}",
         r.runs.size());
  if ((r.kind == CostKind::kRuns || r.kind == CostKind::kClaim) && r.sources.size() > 1)
    fail(ExitCode::kUsage, "upmoe cost: --run charges one --source, found {}", r.sources.size());
  if (r.kind == CostKind::kFit && r.sources.size() > 1 && r.sources.size() != r.fitted.size())
    fail(ExitCode::kUsage, "upmoe cost: --fit: found {} --source for {} runs, expected one for each, or one",
         r.sources.size(), r.fitted.size());
  if (r.kind == CostKind::kModels && !r.machine.empty() && r.tokens == 0)
    fail(ExitCode::kUsage, "upmoe cost: --machine says how long a training takes there: give its --tokens");
  if (command.count("--mfu") > 0 && r.machine.empty())
    fail(ExitCode::kUsage, "upmoe cost: --mfu is a share of a machine's peak: give --machine");
}

}  // namespace upmoe
