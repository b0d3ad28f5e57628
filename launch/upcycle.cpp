// upmoe upcycle: a dense Hugging Face directory becomes a mixture of experts, as a Hugging Face directory or
// as a checkpoint to start training from.

#include "upcycle/upcycler.h"

#include <cstdio>

#include "configs/upcycle_config.h"
#include "kernels/core/log.h"
#include "launch/calibration.h"
#include "launch/command_line.h"
#include "launch/commands.h"
#include "launch/output.h"
#include "launch/step_zero.h"

namespace upmoe {

namespace {

struct UpcycleArguments {
  std::string recipe;
  std::vector<std::string> overrides, from;
  UpcycleOptions options;
  StepZeroRequest check;            // without tokens: none
  TokenRequest prompts, calibrate;  // likewise
  bool plan = false, as_json = false;
};

StepZero checked(const UpcycleArguments& arguments, const std::filesystem::path& made) {
  const StepZeroRequest& request = arguments.check;
  log::info("step 0: the mixture and its source on {}", request.tokens.string());
  const StepZero zero = measure_step_zero(arguments.options.from, made, request);
  log::info(
      "step 0 on {} tokens: loss {:.4f}, of the source {:.4f} "
      "({:+.4f}); KL(source || mixture) {:.4g} nats a token",
      zero.tokens, zero.loss, zero.source_loss, zero.loss - zero.source_loss, zero.divergence);
  return zero;
}

// Tokens that the recipe does not ask.
void note_idle_tokens(const UpcycleArguments& arguments, const UpcycleConfig& config) {
  if (!arguments.prompts.files.empty() && config.router.method != RouterMethod::kPrompts)
    log::warning("--prompts has no effect: router.method is {}", name_of(config.router.method));
  if (!arguments.calibrate.files.empty() && config.experts.method != ExpertMethod::kCluster)
    log::warning("--calibrate has no effect: experts.method is {}", name_of(config.experts.method));
}

int run_upcycle(const UpcycleArguments& arguments, Runtime& runtime) {
  Communicator& world = runtime.world();
  UpcycleConfig config;
  run_agreed(world, [&] {  // rank 0 first: what is wrong is told once
    if (world.rank() == 0) config = read_upcycle_config(arguments.recipe, arguments.overrides);
  });
  run_agreed(world, [&] {
    if (world.rank() != 0) config = read_upcycle_config(arguments.recipe, arguments.overrides);
  });
  UpcyclePlan plan;
  run_agreed(world, [&] {
    if (world.rank() == 0) plan = plan_upcycle(config, arguments.options);
  });
  if (world.rank() == 0) {
    for (const std::string& note : config.notes) log::warning("{}", note);
    // On standard output where it is what was asked for, beside the progress otherwise.
    if (arguments.plan) {
      print_result(arguments.as_json ? plan.json : plan.text);
    } else {
      std::fputs(plan.text.c_str(), stderr);
    }
  }
  if (arguments.plan) return static_cast<int>(ExitCode::kDone);
  UpcycleOptions options = arguments.options;
  if (!arguments.check.tokens.empty()) {
    run_agreed(world, [&] {
      if (world.rank() == 0) require_step_zero_tokens(options.from, arguments.check);
    });
    options.check = [&](const std::filesystem::path& made) { return checked(arguments, made); };
  }
  if (world.rank() == 0) note_idle_tokens(arguments, config);
  if (!arguments.prompts.files.empty() || !arguments.calibrate.files.empty())
    options.calibrate = [&] {
      return calibration_of(config, options.from, arguments.prompts, arguments.calibrate);
    };
  upcycle(config, options, world);
  return static_cast<int>(ExitCode::kDone);
}

// Of what tokens are looked at for, before and behind the work.
void add_token_options(CLI::App& command, UpcycleArguments& arguments) {
  as_path(command.add_option(
      "--check", arguments.check.tokens,
      "Token file: loss before the first step beside the source's, and the divergence of what "
      "both predict, printed and into upcycle_report.json; by rank 0 alone, on the CPU, with "
      "both models in memory (huggingface)"));
  command.add_option("--check-seq-len", arguments.check.seq_len, "Tokens per sequence of --check")
      ->check(above_zero())
      ->capture_default_str();
  command.add_option("--check-sequences", arguments.check.sequences, "The first N sequences of --check")
      ->check(above_zero())
      ->capture_default_str();
  add_choice(command, "--check-precision", arguments.check.precision,
             "fp32 or bf16: of both models in --check");
  as_path(
      command
          .add_option(
              "--prompts", arguments.prompts.files,
              "Token file for router.method prompts: the text that experts are for; given several times, "
              "each for an equal part of them, in this order. Looked at by rank 0 alone, on the CPU, with "
              "the first dense model in memory")
          ->allow_extra_args(false));
  command.add_option("--prompt-seq-len", arguments.prompts.seq_len, "Tokens per sequence of --prompts")
      ->check(above_zero())
      ->capture_default_str();
  command
      .add_option("--prompt-sequences", arguments.prompts.sequences,
                  "The first N sequences of each --prompts")
      ->check(above_zero())
      ->capture_default_str();
  as_path(
      command
          .add_option(
              "--calibrate", arguments.calibrate.files,
              "Token file for experts.method cluster: which neurons are active together. Looked at by rank "
              "0 alone, on the CPU, with the dense model in memory")
          ->allow_extra_args(false));
  command
      .add_option("--calibrate-seq-len", arguments.calibrate.seq_len, "Tokens per sequence of --calibrate")
      ->check(above_zero())
      ->capture_default_str();
  command
      .add_option("--calibrate-sequences", arguments.calibrate.sequences,
                  "The first N sequences of --calibrate")
      ->check(above_zero())
      ->capture_default_str();
}

}  // namespace

void add_upcycle(CLI::App& app, Handler& handler) {
  auto arguments = std::make_shared<UpcycleArguments>();
  CLI::App* command =
      app.add_subcommand("upcycle", "Make a mixture of experts from a dense model, streaming");
  as_path(command
              ->add_option("recipe", arguments->recipe,
                           "Recipe (YAML), e.g. configs/upcycle/qwen1.5-moe-a2.7b.yaml")
              ->required());
  command->add_option("overrides", arguments->overrides, "section.key=value, e.g. experts.reinit=0.25");
  as_path(command
              ->add_option(
                  "--from", arguments->from,
                  "Dense Hugging Face directory; given several times: dense models of one shape, each of "
                  "which makes an equal part of the experts, in this order. With --plan its config.json is "
                  "enough")
              ->required()
              ->allow_extra_args(false));
  as_path(command->add_option("--to", arguments->options.to, "Directory to be made")->required());
  command->footer([] {
    return "Keys of the recipe, section.key = default [type], each also as section.key=value on the command "
           "line.\n\n" +
           upcycle_config_help();
  });
  add_choice(*command, "--form", arguments->options.form,
             "huggingface: a model directory for everybody; checkpoint: one shard per rank with the same "
             "values, for upmoe alone (train with model.path: DIR, eval, inspect, export)");
  add_token_options(*command, *arguments);
  CLI::Option* plan = command->add_flag("--plan", arguments->plan, "Print what would be done and stop");
  command->add_flag("--json", arguments->as_json, "The plan as JSON, with the mixture's configuration")
      ->needs(plan);
  command
      ->add_option("--threads", arguments->options.threads,
                   "Computing threads per rank (0: OMP_NUM_THREADS, else this rank's share of the cores)")
      ->check(zero_or_above())
      ->capture_default_str();
  command
      ->add_option("--max-shard-bytes", arguments->options.max_shard_bytes,
                   "Largest safetensors file, bytes of tensors (huggingface)")
      ->check(above_zero())
      ->capture_default_str();
  command->callback([arguments, command, &handler] {
    if (arguments->options.form == OutputForm::kCheckpoint && command->count("--max-shard-bytes") > 0)
      throw CLI::ValidationError("--max-shard-bytes", "a checkpoint has one shard per rank; leave it out");
    if (arguments->options.form == OutputForm::kCheckpoint && !arguments->check.tokens.empty())
      throw CLI::ValidationError("--check", "needs --form huggingface; `upmoe eval` measures a checkpoint");
    arguments->options.from = arguments->from.front();
    arguments->options.more_from.assign(arguments->from.begin() + 1, arguments->from.end());
    arguments->options.only_planned = arguments->plan;
    handler = [arguments](Runtime& runtime) { return run_upcycle(*arguments, runtime); };
  });
}

}  // namespace upmoe
