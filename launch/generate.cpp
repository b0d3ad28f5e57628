// upmoe generate: text, or tokens, that continue a prompt.

#include <fmt/ranges.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>

#include "data/model_source.h"
#include "data/tokenizer_match.h"
#include "kernels/core/log.h"
#include "launch/command_line.h"
#include "launch/commands.h"
#include "launch/compute_options.h"
#include "launch/generate_bench.h"
#include "launch/growing_text.h"
#include "launch/output.h"
#include "launch/prompts.h"
#include "launch/text_codec.h"
#include "launch/whole_model.h"
#include "trainer/generation_room.h"
#include "trainer/same_inputs.h"

namespace upmoe {

namespace {

struct GenerateArguments {
  std::vector<std::string> models;  // one, unless they are timed
  std::string prompt, batch;
  std::vector<std::int32_t> tokens;
  std::size_t given = 0;  // of the three ways to say what to go on from
  GenerationOptions options;
  bool ignore_eos = false, json = false, chat = false;
  bool bench = false;
  RatesRequest rates;
  std::vector<std::string> at_once = {"1", "8"};
  std::vector<std::int64_t> concurrency;  // what these words say
  double memory_gb = 0;
  std::string machine;
  int tp = 1;
  ComputeOptions compute;
};

// Of rank 0: the model's tokenizer, if it has one.
struct Speaker {
  explicit Speaker(const ModelSource& source) {
    const std::filesystem::path beside = source.companions(), file = beside / "tokenizer.json";
    if (!beside.empty() && std::filesystem::is_regular_file(file)) codec.emplace(file);
    folder = beside.empty() ? source.directory() : beside;
  }
  TextCodec& tokenizer() {
    if (!codec)
      fail(ExitCode::kBadInput, "{} has no tokenizer.json; give the prompt as --tokens 1,2,3",
           folder.string());
    return *codec;
  }
  std::optional<TextCodec> codec;
  std::filesystem::path folder;
};

void check(const GenerateArguments& a) {
  if (a.models.size() != 1)
    fail(ExitCode::kUsage,
         "found {} models: one is needed, to go on with a prompt; several are timed with --bench",
         a.models.size());
  if (a.given != 1) fail(ExitCode::kUsage, "give one of --prompt TEXT, --tokens 1,2,3 and --batch FILE");
  if (a.chat && !a.tokens.empty())
    fail(ExitCode::kUsage, "--chat lays out text, and --tokens are none; give the turn as --prompt");
  if (!(a.options.sampling.top_p > 0)) fail(ExitCode::kUsage, "--top-p: a number above 0, at most 1");
}

// The text of a user as a chat of one turn.
std::string one_turn(const std::string& text) {
  const auto turn = nlohmann::json{{"role", "user"}, {"content", text}};
  const nlohmann::json chat{{"messages", nlohmann::json::array({turn})}};
  return chat.dump(-1, ' ', true, nlohmann::json::error_handler_t::replace);
}

std::vector<Prompt> prompts_of(const GenerateArguments& a, Speaker& speaker) {
  const Encode encode{[&](const std::string& text) {
                        return a.chat ? speaker.tokenizer().encode_chat(one_turn(text))
                                      : speaker.tokenizer().encode(text);
                      },
                      [&](const std::string& chat) { return speaker.tokenizer().encode_chat(chat); }};
  if (!a.batch.empty()) return read_prompts(a.batch, encode);
  return {{a.tokens.empty() ? encode.text(a.prompt) : a.tokens, 0}};
}

void warn_of_sampling(const SamplingRule& rule) {
  if (rule.temperature == 0 && (rule.top_k > 0 || rule.top_p < 1))
    log::warning("--top-k and --top-p have no effect without --temperature: the likeliest token is taken");
}

void warn_of_positions(const ModelConfig& config, const std::vector<Prompt>& prompts, std::int64_t more) {
  std::int64_t longest = 0;
  for (const Prompt& p : prompts) longest = std::max(longest, p.length());
  if (longest + more > config.max_position_embeddings)
    log::warning("{} tokens and {} new ones: the model was made for {} positions", longest, more,
                 config.max_position_embeddings);
}

// One answer on the terminal, as it comes: text, or the numbers of tokens where there is no tokenizer.
class Streamed {
 public:
  explicit Streamed(Speaker& speaker) {
    if (speaker.codec)
      text_.emplace([&](std::span<const std::int32_t> tokens) { return speaker.codec->decode(tokens); },
                    speaker.codec->byte_tokens());
  }
  void add(std::int32_t token) {
    print_result(text_ ? text_->add(token) : fmt::format("{}{}", count_ > 0 ? "," : "", token));
    ++count_;
  }
  void finish() { print_result((text_ ? text_->finish() : std::string()) + "\n"); }

 private:
  std::optional<GrowingText> text_;
  std::int64_t count_ = 0;
};

void print_json(const Generated& made, Speaker& speaker) {
  for (const std::vector<std::int32_t>& tokens : made.tokens) {
    nlohmann::json line{{"tokens", tokens}, {"text", nullptr}, {"tokens_per_s", made.tokens_per_s()}};
    if (speaker.codec) line["text"] = speaker.codec->decode(tokens);
    print_result(line.dump() + "\n");
  }
}

void print_answers(const Generated& made, Speaker& speaker) {
  for (std::size_t i = 0; i < made.tokens.size(); ++i)
    print_result(fmt::format("[{}] {}\n", i,
                             speaker.codec ? speaker.codec->decode(made.tokens[i])
                                           : fmt::format("{}", fmt::join(made.tokens[i], ","))));
}

void report_rates(const Generated& made) {
  log::info("{} tokens of prompts in {:.3g} s, {} new ones in {:.3g} s more: {:.4g} tokens/s",
            made.prompt_tokens, made.prefill_seconds, made.new_tokens, made.decode_seconds,
            made.tokens_per_s());
}

int run_generate(const GenerateArguments& a, Runtime& runtime) {
  check(a);
  const Device device = a.compute.choose_device(runtime);
  Communicator& world = runtime.world();
  const bool first = world.rank() == 0;
  std::unique_ptr<ModelSource> source;
  std::optional<Speaker> speaker;
  std::vector<Prompt> prompts;
  GenerationOptions options = a.options;
  MeshSpec mesh;
  run_agreed(world, [&] {
    source = open_model(a.models.front());
    mesh = generation_mesh(source->config(), world.size(), a.tp);
    // The model's own, also where the directory that it was trained from is gone.
    std::set<std::int64_t> ends = text_ends_of(source->companions());
    ends.merge(text_ends_in(source->config().raw_json));
    if (!a.ignore_eos)
      for (const std::int64_t token : ends)
        if (token >= 0 && token < source->config().vocab_size)
          options.stop.push_back(static_cast<std::int32_t>(token));
    if (!first) return;
    prompts = prompts_of(a, speaker.emplace(*source));
    if (const std::string wrong = refusal_of(source->config(), prompts); !wrong.empty())
      fail(ExitCode::kBadInput, "{}: {}", a.models.front(), wrong);
    warn_of_sampling(options.sampling);
    if (const auto unfollowed = unfollowed_settings(source->companions()); !unfollowed.empty())
      log::warning("{}/generation_config.json: {} is not followed here; transformers' generate() follows it",
                   source->companions().string(), fmt::join(unfollowed, ", "));
    warn_of_positions(source->config(), prompts, options.max_new_tokens);
  });
  require_same_model(world, a.models.front(), *source);
  // Beside the model: ranks that share a row must end it at one token.
  require_equal(world, "tokens that end a text", fmt::format("{}", fmt::join(options.stop, ",")));
  share_prompts(world, prompts);

  RankModel model(source->config(), mesh, world, device, a.compute.model_options());
  run_agreed(world, [&] { load_weights(model, *source); });
  if (options.rows == 0) options.rows = rows_that_fit(model, prompts, options);
  std::optional<Streamed> streamed;
  if (first && !a.json && a.batch.empty()) streamed.emplace(*speaker);
  const Generated made = generate(model, prompts, options, [&](std::size_t, std::int32_t token, auto) {
    if (streamed) streamed->add(token);
  });
  if (!first) return 0;
  if (streamed) {
    streamed->finish();
  } else if (a.json) {
    print_json(made, *speaker);
  } else {
    print_answers(made, *speaker);
  }
  report_rates(made);
  return 0;
}

int run_bench(const GenerateArguments& a, Runtime& runtime) {
  return run_generate_bench(
      {a.models, a.rates, a.concurrency, a.memory_gb, a.machine, a.tp, a.compute, a.json}, runtime);
}

// Numbers that rise, each once; none for `auto`.
std::vector<std::int64_t> concurrency_of(const std::vector<std::string>& words) {
  if (words == std::vector<std::string>{"auto"}) return {};
  std::set<std::int64_t> numbers;
  for (const std::string& word : words) {
    std::int64_t number = 0;
    if (!CLI::detail::lexical_cast(word, number) || number < 1)
      throw CLI::ValidationError(
          "--concurrency",
          fmt::format("found '{}', expected whole numbers above 0, such as 1,8,64, or auto alone", word));
    numbers.insert(number);
  }
  return {numbers.begin(), numbers.end()};
}

using Options = std::vector<CLI::Option*>;

// What to go on from; one of them is needed.
Options add_prompts(CLI::App& command, GenerateArguments& a) {
  return {command.add_option("--prompt", a.prompt, "Text to go on from"),
          command.add_option("--tokens", a.tokens, "The same as tokens: 1,2,3")
              ->delimiter(',')
              ->allow_extra_args(false)
              ->check(zero_or_above()),
          as_path(command.add_option(
              "--batch", a.batch,
              "JSON lines, an object with \"prompt\", \"messages\" or \"tokens\" for each answer"))};
}

// How answers are made of it.
Options add_answers(CLI::App& command, GenerateArguments& a) {
  SamplingRule& rule = a.options.sampling;
  return {command.add_option("--max-new-tokens", a.options.max_new_tokens, "New tokens of a prompt, at most")
              ->check(zero_or_above())
              ->capture_default_str(),
          command
              .add_option(
                  "--rows", a.options.rows,
                  "Answers that a rank makes at once, while others wait (default: as many as memory has room "
                  "for on a GPU, 64 on a CPU)")
              ->check(above_zero()),
          command
              .add_option("--temperature", rule.temperature,
                          "Of sampling; 0: the likeliest token, the lowest of equals")
              ->check(zero_or_above())
              ->capture_default_str(),
          command.add_option("--top-k", rule.top_k, "Sample from the N likeliest tokens (0: all)")
              ->check(zero_or_above())
              ->capture_default_str(),
          command
              .add_option("--top-p", rule.top_p,
                          "Sample from the fewest tokens that have this probability together")
              ->check(CLI::Range(0.0, 1.0))
              ->capture_default_str(),
          command.add_option("--seed", rule.seed, "Of sampling, with the prompt's number and the position")
              ->check(zero_or_above())
              ->capture_default_str(),
          command.add_flag("--chat", a.chat,
                           "Prompts of text are a user's turn, laid out by the model's chat template"),
          command.add_flag("--ignore-eos", a.ignore_eos, "Go on behind tokens that end text (eos_token_id)")};
}

// Times in place of answers.
void add_bench(CLI::App& command, GenerateArguments& a, const Options& others) {
  CLI::Option* bench = command.add_flag(
      "--bench", a.bench,
      "Time one MODEL, or several in turns; random weights where there is a configuration alone");
  for (CLI::Option* other : others) bench->excludes(other);
  RatesRequest& r = a.rates;
  const Options its{
      command.add_option("--in", r.prompt, "With --bench: tokens of a request's prompt")->check(above_zero()),
      command.add_option("--out", r.output, "With --bench: tokens of its answer, 2 or more")
          ->check(CLI::Range(std::int64_t{2}, std::int64_t{1} << 31)),
      command
          .add_option("--concurrency", a.at_once,
                      "With --bench: requests at once, such as 1,8,64; auto: of each model 1, 4, 16, ... and "
                      "as many as fit into memory")
          ->delimiter(',')
          ->allow_extra_args(false),
      command.add_option("--rounds", r.rounds, "With --bench: rounds, of which medians are taken")
          ->check(above_zero())};
  for (CLI::Option* option : its) option->needs(bench)->capture_default_str();
  command
      .add_option(
          "--memory", a.memory_gb,
          "With --concurrency auto: 10^9 bytes of a rank, to fit into (default: of a GPU its own, of a "
          "host what is left, shared by its ranks)")
      ->check(above_zero())
      ->needs(bench);
  as_path(command.add_option(
              "--machine", a.machine,
              "With --bench: what this device reaches at best beside the rates; a file, or a name of "
              "configs/machines"))
      ->needs(bench);
}

}  // namespace

void add_generate(CLI::App& app, Handler& handler) {
  auto a = std::make_shared<GenerateArguments>();
  CLI::App* command = app.add_subcommand(
      "generate", "Continues prompts, greedily or at random, with a cache of keys and values; or times that");
  add_model(*command, a->models, "; with --bench also several, a config.json, or a name of configs/models");
  const Options prompts = add_prompts(*command, *a);
  Options others = add_answers(*command, *a);
  others.insert(others.end(), prompts.begin(), prompts.end());
  add_bench(*command, *a, others);
  command->add_flag("--json", a->json,
                    "For each prompt one object: tokens, text, tokens_per_s; with --bench one of all");
  command->add_option("--tp", a->tp, "Ranks that share each layer; the others take prompts of their own")
      ->check(above_zero())
      ->capture_default_str();
  add_compute_options(*command, a->compute);
  command->callback([=, &handler] {
    for (const CLI::Option* way : prompts) a->given += way->count() > 0 ? 1 : 0;
    a->concurrency = concurrency_of(a->at_once);
    handler = [a](Runtime& runtime) { return a->bench ? run_bench(*a, runtime) : run_generate(*a, runtime); };
  });
}

}  // namespace upmoe
