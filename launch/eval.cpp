// upmoe eval: held-out loss of a model directory or checkpoint, and its logits.

#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>

#include "data/model_source.h"
#include "kernels/core/log.h"
#include "launch/command_line.h"
#include "launch/commands.h"
#include "launch/compute_options.h"
#include "launch/output.h"
#include "launch/token_sets.h"
#include "launch/whole_model.h"
#include "trainer/held_out.h"
#include "trainer/logits_file.h"
#include "trainer/same_inputs.h"

namespace upmoe {

namespace {

constexpr double kLargest = std::numeric_limits<double>::max();  // JSON has no infinity

struct EvalArguments {
  std::string model, logits;
  std::vector<std::string> data, names;
  ComputeOptions compute;
  std::int64_t seq_len = 0, sequences = 0, micro_batch = 4;
  bool mask_documents = false, loss_mask = false;
};

std::vector<std::string> set_names(const std::vector<std::string>& files, std::vector<std::string> given) {
  if (given.empty())
    for (const std::string& file : files) given.push_back(std::filesystem::path(file).stem().string());
  return given;
}

[[noreturn]] void refuse_not_finite(const EvalArguments& a, const std::string& what) {
  fail(ExitCode::kNumeric,
       "{}: {} over {} in {}: either weights are not finite, or what they compute; "
       "`upmoe inspect --verify {}` reads every weight",
       a.model, what, fmt::join(a.data, ", "), name_of(a.compute.precision), a.model);
}

void check(const EvalArguments& a, const Communicator& world) {
  if (!a.logits.empty() && world.size() > 1)
    fail(ExitCode::kUsage, "--logits needs one rank; start upmoe eval alone");
  if (!a.logits.empty() && a.data.size() > 1) fail(ExitCode::kUsage, "--logits: of one --data");
  if (!a.names.empty() && a.names.size() != a.data.size())
    fail(ExitCode::kUsage, "{} names for {} token files; give --name once per --data", a.names.size(),
         a.data.size());
  const std::vector<std::string> names = set_names(a.data, a.names);
  for (std::size_t i = 0; i < names.size(); ++i)
    for (std::size_t j = 0; j < i; ++j)
      if (names[i] == names[j])
        fail(ExitCode::kUsage, "two token files have the name '{}'; tell them apart with --name", names[i]);
}

nlohmann::json object_of(const EvalResult& result, std::int64_t sequences) {
  return {{"loss", result.loss},
          {"perplexity", std::min(std::exp(result.loss), kLargest)},
          {"tokens", result.tokens},
          {"sequences", sequences},
          {"seconds", result.seconds}};
}

TokenSets open_sets(const EvalArguments& a, const ModelSource& source, bool speaks) {
  const std::vector<std::filesystem::path> files(a.data.begin(), a.data.end());
  TokenSets sets = open_token_sets(
      source, {.files = files, .seq_len = a.seq_len, .loss_mask = a.loss_mask, .warns = speaks});
  for (std::size_t i = 0; i < sets.size() && speaks; ++i) {
    if (a.sequences > sets[i]->num_sequences())
      log::warning("--sequences {}: {} holds {} of {} tokens; all of them are used", a.sequences, a.data[i],
                   sets[i]->num_sequences(), a.seq_len);
    if (sets[i]->files().front()->has_loss_mask() && !a.loss_mask)
      log::warning("{} has a loss mask, but every target counts: --loss-mask is not given", a.data[i]);
  }
  return sets;
}

std::vector<HeldOutLoss> evaluate_sets(const EvalArguments& a, RankModel& model, const TokenSets& sets,
                                       const LmHead::Sink& sink) {
  const std::vector<std::string> names = set_names(a.data, a.names);
  std::vector<HeldOutLoss> losses;
  try {
    for (std::size_t i = 0; i < sets.size(); ++i)
      losses.push_back({names[i], evaluate(model, *sets[i],
                                           {sequences_asked(a.sequences, sets[i]->num_sequences()),
                                            a.micro_batch, a.mask_documents},
                                           sink)});
  } catch (const PeerError&) {
    throw;
  } catch (const Error& e) {  // an operation met the value first, and speaks of training
    if (e.code() == ExitCode::kNumeric) refuse_not_finite(a, "values on the way to the loss are not finite");
    throw;
  }
  return losses;
}

// Of one set its own; of several all together, and each by its name.
nlohmann::json report_of(const EvalArguments& a, const std::vector<HeldOutLoss>& losses,
                         const TokenSets& sets) {
  std::int64_t sequences = 0;
  for (const auto& set : sets) sequences += sequences_asked(a.sequences, set->num_sequences());
  nlohmann::json report = object_of(together(losses), sequences);
  for (std::size_t i = 0; i < losses.size() && losses.size() > 1; ++i)
    report["sets"][losses[i].name] =
        object_of(losses[i].result, sequences_asked(a.sequences, sets[i]->num_sequences()));
  return report;
}

int run_eval(const EvalArguments& a, Runtime& runtime) {
  const Device device = a.compute.choose_device(runtime);
  Communicator& world = runtime.world();
  check(a, world);
  std::unique_ptr<ModelSource> source;
  run_agreed(world, [&] { source = open_model(a.model); });
  require_same_model(world, a.model, *source);
  const ModelConfig& config = source->config();
  if (a.seq_len > config.max_position_embeddings && world.rank() == 0)
    log::warning("--seq-len {}: the model was made for {} positions", a.seq_len,
                 config.max_position_embeddings);

  RankModel model(config, evaluation_mesh(config, world.size()), world, device, a.compute.model_options());
  TokenSets sets;
  run_agreed(world, [&] {
    load_weights(model, *source);
    sets = open_sets(a, *source, world.rank() == 0);
  });
  // Ranks that read other sequences would not evaluate as many.
  std::string data;
  for (const auto& set : sets) data += set->fingerprint() + "\n";
  require_equal(world, "token files", data);

  std::optional<LogitsFile> logits;
  if (!a.logits.empty())
    logits.emplace(
        a.logits, std::vector<std::filesystem::path>{source->directory(), a.data.front()},
        Shape{sequences_asked(a.sequences, sets.front()->num_sequences()), a.seq_len, config.vocab_size});
  const std::vector<HeldOutLoss> losses =
      evaluate_sets(a, model, sets, logits ? logits->sink() : LmHead::Sink{});
  if (logits) logits->write();
  for (const HeldOutLoss& of : losses)
    if (!std::isfinite(of.result.loss)) refuse_not_finite(a, fmt::format("the loss is {}", of.result.loss));
  if (world.rank() == 0) print_result(report_of(a, losses, sets).dump() + "\n");
  return 0;
}

}  // namespace

void add_eval(CLI::App& app, Handler& handler) {
  auto a = std::make_shared<EvalArguments>();
  CLI::App* command =
      app.add_subcommand("eval", "Held-out loss and perplexity of a model, as one JSON object");
  add_model(*command, a->model);
  as_path(command->add_option("--data", a->data, "Token file; several times: the loss of each and of all")
              ->required()
              ->take_all()
              ->allow_extra_args(false));
  command
      ->add_option(
          "--name", a->names,
          "Name of a token file among several, once per --data (default: the file's without its extension)")
      ->take_all()
      ->allow_extra_args(false);
  command->add_option("--seq-len", a->seq_len, "Tokens per sequence")->required()->check(above_zero());
  command->add_option("--sequences", a->sequences, "Only the first N sequences of each token file (0: all)")
      ->check(zero_or_above())
      ->capture_default_str();
  command->add_option("--micro-batch", a->micro_batch, "Sequences at once per rank")
      ->check(above_zero())
      ->capture_default_str();
  add_compute_options(*command, a->compute);
  command->add_flag("--mask-documents", a->mask_documents,
                    "Attention and positions restart at each document");
  command->add_flag("--loss-mask", a->loss_mask, "Targets that the file's loss mask leaves out do not count");
  as_path(command->add_option("--logits", a->logits,
                              "Also write the logits (tensor `logits`, fp32) to this safetensors file"));
  command->callback([a, &handler] { handler = [a](Runtime& runtime) { return run_eval(*a, runtime); }; });
}

}  // namespace upmoe
