// upmoe eval: held-out loss of a model directory or checkpoint, and its logits.

#include <algorithm>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>

#include "data/model_source.h"
#include "data/tokenizer_match.h"
#include "kernels/core/log.h"
#include "launch/command_line.h"
#include "launch/commands.h"
#include "launch/output.h"
#include "trainer/evaluation.h"
#include "trainer/logits_file.h"

namespace upmoe {

namespace {

constexpr double kLargest = std::numeric_limits<double>::max();  // JSON has no infinity

struct EvalArguments {
  std::string model, data, logits;
  Precision precision = Precision::kFp32;
  RouterDType router = RouterDType::kAuto;
  DeviceChoice device = DeviceChoice::kAuto;
  std::int64_t seq_len = 0, sequences = 0, micro_batch = 4;
  bool mask_documents = false, loss_mask = false;
};

[[noreturn]] void refuse_not_finite(const EvalArguments& a, const std::string& what) {
  fail(ExitCode::kNumeric,
       "{}: {} over {} in {}: either weights are not finite, or what they compute; "
       "`upmoe inspect --verify {}` reads every weight",
       a.model, what, a.data, name_of(a.precision), a.model);
}

int run_eval(const EvalArguments& a, Runtime& runtime) {
  const Device device = runtime.choose_device(a.device);
  remark_on_precision(a.precision, device);
  Communicator& world = runtime.world();
  if (!a.logits.empty() && world.size() > 1)
    fail(ExitCode::kUsage, "--logits needs one rank; start upmoe eval alone");
  std::unique_ptr<ModelSource> source;
  run_agreed(world, [&] { source = open_model(a.model); });
  const ModelConfig& config = source->config();
  if (a.seq_len > config.max_position_embeddings && world.rank() == 0)
    log::warning("--seq-len {}: the model was made for {} positions", a.seq_len,
                 config.max_position_embeddings);

  RankModel model(config, evaluation_mesh(config, world.size()), world, device,
                  {.dtype = dtype_of(a.precision), .fp32 = fp32_roles(a.router), .gradients = false});
  std::unique_ptr<TokenDataset> data;
  run_agreed(world, [&] {
    model.params.load(model.memory.exec,
                      [&](const ParamSpec& p, const Box& box, TensorView out) { source->read(p, box, out); });
    data = std::make_unique<TokenDataset>(std::vector<TokenDataset::Source>{{a.data, 1.0, a.loss_mask}},
                                          a.seq_len, false, 0, config.vocab_size);
    if (world.rank() != 0) return;
    for (const std::string& words : tokenizer_differences(source->companions(), data->files()))
      log::warning("{}", words);
  });

  std::optional<LogitsFile> logits;
  const std::int64_t sequences =
      a.sequences == 0 ? data->num_sequences() : std::min(a.sequences, data->num_sequences());
  if (a.sequences > sequences && world.rank() == 0)
    log::warning("--sequences {}: {} holds {} of {} tokens; all of them are used", a.sequences, a.data,
                 sequences, a.seq_len);
  if (!a.logits.empty())
    logits.emplace(a.logits, std::vector<std::filesystem::path>{source->directory(), a.data},
                   Shape{sequences, a.seq_len, config.vocab_size});
  EvalResult result;
  try {
    result = evaluate(model, *data, {sequences, a.micro_batch, a.mask_documents},
                      logits ? logits->sink() : LmHead::Sink{});
  } catch (const PeerError&) {
    throw;
  } catch (const Error& e) {  // an operation met the value first, and speaks of training
    if (e.code() == ExitCode::kNumeric) refuse_not_finite(a, "values on the way to the loss are not finite");
    throw;
  }
  if (logits) logits->write();
  if (!std::isfinite(result.loss)) refuse_not_finite(a, fmt::format("the loss is {}", result.loss));
  if (world.rank() == 0)
    print_result(nlohmann::json{{"loss", result.loss},
                                {"perplexity", std::min(std::exp(result.loss), kLargest)},
                                {"tokens", result.tokens},
                                {"sequences", sequences},
                                {"seconds", result.seconds}}
                     .dump() +
                 "\n");
  return 0;
}

}  // namespace

void add_eval(CLI::App& app, Handler& handler) {
  auto a = std::make_shared<EvalArguments>();
  CLI::App* command =
      app.add_subcommand("eval", "Held-out loss and perplexity of a model, as one JSON object");
  as_path(command->add_option("model", a->model, "Hugging Face directory, checkpoint or run directory")
              ->required());
  as_path(command->add_option("--data", a->data, "Token file")->required());
  command->add_option("--seq-len", a->seq_len, "Tokens per sequence")->required()->check(CLI::PositiveNumber);
  command->add_option("--sequences", a->sequences, "Only the first N sequences (0: all)")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command->add_option("--micro-batch", a->micro_batch, "Sequences at once per rank")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  add_choice(*command, "--precision", a->precision, "fp32 or bf16");
  add_choice(*command, "--router-dtype", a->router, "auto, or fp32: routers in fp32 beside bf16");
  add_choice(*command, "--device", a->device, "cpu, cuda, or auto: GPUs where every rank has one");
  command->add_flag("--mask-documents", a->mask_documents,
                    "Attention and positions restart at each document");
  command->add_flag("--loss-mask", a->loss_mask, "Targets that the file's loss mask leaves out do not count");
  as_path(command->add_option("--logits", a->logits,
                              "Also write the logits (tensor `logits`, fp32) to this safetensors file"));
  command->callback([a, &handler] { handler = [a](Runtime& runtime) { return run_eval(*a, runtime); }; });
}

}  // namespace upmoe
