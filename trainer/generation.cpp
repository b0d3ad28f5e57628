#include "trainer/generation.h"

#include <algorithm>
#include <chrono>
#include <optional>

#include "configs/run_problems.h"
#include "kernels/ops/transfer.h"
#include "parallel/watchdog.h"
#include "trainer/evaluation.h"
#include "trainer/generation_room.h"
#include "trainer/placed_vectors.h"

namespace upmoe {

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// One row on the rank that computes it.
struct Row {
  std::size_t prompt = 0;
  std::int64_t length = 0;  // of all its tokens, the newest included, which has not been through the model
  std::int32_t newest = 0;
  std::int64_t made = 0;
  bool ended = false;
};

// New tokens of a forward pass: on the host, one vector each.
struct Step {
  std::vector<std::int32_t> tokens, rows, positions, picks;
  bool begins = false;
  std::int64_t run = 0;     // CachedTokens'
  bool row_by_row = false;  // Exec's: a token of each of several rows
  void add(std::int32_t token, std::int64_t row, std::int64_t position) {
    tokens.push_back(token);
    rows.push_back(static_cast<std::int32_t>(row));
    positions.push_back(static_cast<std::int32_t>(position));
  }
  void pick_last() { picks.push_back(static_cast<std::int32_t>(tokens.size()) - 1); }
};

class Generator {
 public:
  Generator(RankModel& model, Arena& keep, std::span<const Prompt> prompts, const GenerationOptions& options,
            const TokenSink& sink);
  Generated run();

 private:
  std::int64_t forwards_of(const Prompt& prompt) const {
    return (prompt.length() + options_.chunk - 1) / options_.chunk;
  }
  std::size_t waves() const;
  void begin_wave(std::size_t wave);
  std::int64_t passes_of(int rank, std::size_t wave) const;
  void prefill(std::size_t wave);
  void prefill_chunk(Row& row, std::int64_t number, std::int64_t begin);
  void decode();
  void decode_step(Step step, const std::vector<std::size_t>& under_way);
  GenerationMemory memory() const;
  std::vector<float> forward(Step step);
  CachedTokens place(const Step& step, MicroBatch& batch, ConstTensorView& picks);
  std::int64_t keys_seen(const Step& step) const;
  void take(Row& row, std::span<const float> logits_V);
  bool anyone(bool here) const;
  std::vector<std::vector<std::int32_t>> gathered() const;

  RankModel& model_;
  const Transformer& transformer_;
  std::span<const Prompt> prompts_;
  GenerationOptions options_;
  const TokenSink& sink_;
  std::int64_t vocab_;
  int ranks_, rank_;                             // along dp
  bool speaks_;                                  // for its rows: the first along tp
  std::vector<std::size_t> mine_;                // prompts of this rank
  std::size_t at_once_;                          // of a rank's prompts
  std::vector<Row> rows_;                        // of the wave under way
  std::vector<std::vector<std::int32_t>> made_;  // by prompt
  std::vector<double> step_seconds_;
  Arena& keep_;
  ScratchScope scope_;  // of keep_
  std::optional<KeyCaches> caches_;
  std::size_t above_caches_ = 0;  // where activations begin in keep_
  PlacedVectors placed_;
};

Generator::Generator(RankModel& model, Arena& keep, std::span<const Prompt> prompts,
                     const GenerationOptions& options, const TokenSink& sink)
    : model_(model),
      transformer_(model.chunks.front()),
      prompts_(prompts),
      options_(options),
      sink_(sink),
      vocab_(model.config.vocab_size),
      ranks_(model.mesh.spec().dp),
      rank_(model.mesh.coord(Axis::kDp)),
      speaks_(model.mesh.coord(Axis::kTp) == 0),
      at_once_(options.rows > 0 ? static_cast<std::size_t>(options.rows)
                                : std::max<std::size_t>(1, prompts.size())),
      made_(prompts.size()),
      keep_(keep),
      scope_(keep) {
  for (std::size_t i = static_cast<std::size_t>(rank_); i < prompts.size();
       i += static_cast<std::size_t>(ranks_))
    mine_.push_back(i);
  const auto rows = static_cast<std::int64_t>(std::min(mine_.size(), at_once_));
  caches_.emplace(keep, transformer_.attention_of_blocks(), rows,
                  slots_of(model.config, prompts, mine_, options), transformer_.dtype);
  above_caches_ = keep.mark();
  keep.restart_peak();
}

// All ranks have as many, which some of them have no rows for.
std::size_t Generator::waves() const {
  const auto ranks = static_cast<std::size_t>(ranks_), most = (prompts_.size() + ranks - 1) / ranks;
  return (most + at_once_ - 1) / at_once_;
}

void Generator::begin_wave(std::size_t wave) {
  rows_.clear();
  for (std::size_t i = wave * at_once_; i < std::min(mine_.size(), (wave + 1) * at_once_); ++i)
    rows_.push_back({mine_[i], prompts_[mine_[i]].length()});
}

// Where keys lie on this rank says how many a token sees: itself and those before it that no window hides.
std::int64_t Generator::keys_seen(const Step& step) const {
  const std::int64_t window = model_.config.sliding_window;
  std::int64_t seen = 0;
  for (std::size_t t = 0; t < step.rows.size(); ++t) {
    if (step.rows[t] < 0) continue;
    const std::int64_t all = step.positions[t] + 1;
    seen += window > 0 ? std::min(all, window) : all;
  }
  return seen;
}

CachedTokens Generator::place(const Step& step, MicroBatch& batch, ConstTensorView& picks) {
  ConstTensorView rows_T;
  const PlacedVectors::Part parts[] = {{step.tokens, batch.tokens_T},
                                       {step.rows, rows_T},
                                       {step.positions, batch.places.positions_T},
                                       {step.picks, picks}};
  placed_.place(model_.memory.exec, parts);
  batch.targets_T = batch.tokens_T;
  batch.places.seq_len = std::max<std::int64_t>(1, static_cast<std::int64_t>(step.tokens.size()));
  return {rows_T, batch.places.positions_T, keys_seen(step), step.run};
}

// The logits of the picked tokens on the host, one row behind the other. Collective over all ranks.
std::vector<float> Generator::forward(Step step) {
  watchdog::heartbeat();
  Exec ex = model_.memory.exec;
  ex.row_by_row = step.row_by_row;
  const auto tp = static_cast<std::size_t>(model_.mesh.spec().tp);
  const std::size_t wanted = step.picks.size();
  while (step.tokens.size() % tp != 0) step.add(0, -1, 0);      // tokens of none, behind the others
  while (step.picks.size() % tp != 0) step.picks.push_back(0);  // and picks that nobody wants
  keep_.rewind(above_caches_);
  MicroBatch batch;
  ConstTensorView picks;
  const CachedTokens tokens = place(step, batch, picks);
  const TensorView logits_NV = transformer_.logits(ex, batch, {*caches_, tokens, step.begins, picks}, keep_);
  std::vector<float> host(wanted * static_cast<std::size_t>(vocab_));
  if (host.empty()) return host;
  const TensorView wanted_NV = logits_NV.rows(0, static_cast<std::int64_t>(wanted));
  ops::download(ex, host_view(host.data(), wanted_NV.shape), wanted_NV);
  return host;
}

void Generator::take(Row& row, std::span<const float> logits_V) {
  const std::int32_t token = next_token(logits_V, options_.sampling, {prompts_[row.prompt].row, row.length});
  made_[row.prompt].push_back(token);
  row.newest = token;
  ++row.length;
  ++row.made;
  row.ended = row.made == options_.max_new_tokens ||
              std::find(options_.stop.begin(), options_.stop.end(), token) != options_.stop.end();
  if (sink_ && speaks_) sink_(row.prompt, token, logits_V);
}

void Generator::prefill_chunk(Row& row, std::int64_t number, std::int64_t begin) {
  const Prompt& prompt = prompts_[row.prompt];
  const std::int64_t end = std::min(prompt.length(), begin + options_.chunk);
  Step step;
  step.begins = begin == 0;
  step.run = end - begin;
  for (std::int64_t p = begin; p < end; ++p) step.add(prompt.tokens[static_cast<std::size_t>(p)], number, p);
  const bool whole = end == prompt.length();
  if (whole) step.pick_last();
  const std::vector<float> logits = forward(std::move(step));
  if (whole) take(row, logits);
}

// Forward passes that the prompts of a rank take in a wave.
std::int64_t Generator::passes_of(int rank, std::size_t wave) const {
  const auto ranks = static_cast<std::size_t>(ranks_);
  std::int64_t passes = 0;
  for (std::size_t n = wave * at_once_; n < (wave + 1) * at_once_; ++n) {
    const std::size_t i = static_cast<std::size_t>(rank) + n * ranks;
    if (i >= prompts_.size()) break;
    passes += forwards_of(prompts_[i]);
  }
  return passes;
}

// Every rank takes part in as many forward passes as the one with the most: all know all prompts.
void Generator::prefill(std::size_t wave) {
  std::int64_t most = 0;
  for (int rank = 0; rank < ranks_; ++rank) most = std::max(most, passes_of(rank, wave));
  for (std::size_t r = 0; r < rows_.size(); ++r)
    for (std::int64_t begin = 0; begin < prompts_[rows_[r].prompt].length(); begin += options_.chunk)
      prefill_chunk(rows_[r], static_cast<std::int64_t>(r), begin);
  for (std::int64_t i = passes_of(rank_, wave); i < most; ++i) forward({});
}

bool Generator::anyone(bool here) const {
  if (model_.mesh.world().size() == 1) return here;
  std::int32_t any = here ? 1 : 0;
  model_.mesh.world().all_reduce(host_view(&any, {1}), ReduceOp::kMax);
  return any != 0;
}

void Generator::decode() {
  for (;;) {
    Step step;
    step.row_by_row = true;
    std::vector<std::size_t> under_way;
    for (std::size_t r = 0; r < rows_.size(); ++r) {
      if (rows_[r].ended) continue;
      under_way.push_back(r);
      step.add(rows_[r].newest, static_cast<std::int64_t>(r), rows_[r].length - 1);
      step.pick_last();
    }
    if (!anyone(!under_way.empty())) return;
    const auto start = Clock::now();
    decode_step(std::move(step), under_way);
    step_seconds_.push_back(seconds_since(start));
  }
}

void Generator::decode_step(Step step, const std::vector<std::size_t>& under_way) {
  const std::vector<float> logits = forward(std::move(step));
  for (std::size_t i = 0; i < under_way.size(); ++i)
    take(rows_[under_way[i]],
         std::span(logits).subspan(i * static_cast<std::size_t>(vocab_), static_cast<std::size_t>(vocab_)));
}

GenerationMemory Generator::memory() const {
  return {model_.params.value_bytes(), caches_->bytes(),
          keep_.peak() - above_caches_ + model_.memory.scratch.peak(), caches_->rows()};
}

// Those of all ranks: each row is written by one, and a place without a token is 0.
std::vector<std::vector<std::int32_t>> Generator::gathered() const {
  if (model_.mesh.world().size() == 1) return made_;
  const auto width = static_cast<std::size_t>(options_.max_new_tokens);
  std::vector<std::int32_t> all(made_.size() * width);
  for (std::size_t i = 0; speaks_ && i < made_.size(); ++i)
    for (std::size_t n = 0; n < made_[i].size(); ++n) all[i * width + n] = made_[i][n] + 1;
  model_.mesh.world().all_reduce(host_view(all.data(), {static_cast<std::int64_t>(all.size())}),
                                 ReduceOp::kSum);
  std::vector<std::vector<std::int32_t>> tokens(made_.size());
  for (std::size_t i = 0; i < made_.size(); ++i)
    for (std::size_t n = 0; n < width && all[i * width + n] > 0; ++n)
      tokens[i].push_back(all[i * width + n] - 1);
  return tokens;
}

Generated Generator::run() {
  Generated result;
  for (std::size_t wave = 0; wave < waves(); ++wave) {
    const auto start = Clock::now();
    begin_wave(wave);
    prefill(wave);
    result.prefill_seconds += seconds_since(start);
    const auto filled = Clock::now();
    decode();
    result.decode_seconds += seconds_since(filled);
  }
  result.step_seconds = std::move(step_seconds_);
  result.memory = memory();
  result.tokens = gathered();
  for (std::size_t i = 0; i < prompts_.size(); ++i) {
    result.prompt_tokens += prompts_[i].length();
    result.new_tokens += static_cast<std::int64_t>(result.tokens[i].size());
  }
  return result;
}

}  // namespace

double Generated::tokens_per_s() const {
  const double seconds = prefill_seconds + decode_seconds;
  return seconds > 0 ? static_cast<double>(new_tokens) / seconds : 0;
}

MeshSpec generation_mesh(const ModelConfig& config, int ranks, int tp) {
  if (tp < 1 || ranks % tp != 0)
    fail(ExitCode::kUsage, "--tp {} does not divide the {} ranks of this job", tp, ranks);
  if (const auto problems = tensor_axis_problems("--tp", tp, config); !problems.empty())
    fail(ExitCode::kUsage, "{}", problems.front());
  MeshSpec spec = evaluation_mesh(config, ranks);
  spec.dp = ranks / tp;
  spec.tp = tp;
  return spec;
}

std::string refusal_of(const ModelConfig& config, std::span<const Prompt> prompts) {
  if (config.routes_groups())
    return fmt::format(
        "a model whose routers are of kind {} cannot generate: what a token gets depends on the other "
        "sequences of its group, which a prompt has not",
        name_of(config.router.kind));
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    const std::vector<std::int32_t>& tokens = prompts[i].tokens;
    if (tokens.empty())
      return fmt::format("prompt {} has no tokens; one at least is needed to go on from", i);
    if (prompts[i].length() > config.max_position_embeddings)
      return fmt::format("prompt {} has {} tokens, and the model positions for {}; shorten it", i,
                         tokens.size(), config.max_position_embeddings);
    for (const std::int32_t token : tokens)
      if (token < 0 || token >= config.vocab_size)
        return fmt::format("prompt {}: token {} is none of the model's {} tokens, 0 to {}", i, token,
                           config.vocab_size, config.vocab_size - 1);
  }
  return {};
}

Generated generate(RankModel& model, std::span<const Prompt> prompts, const GenerationOptions& options,
                   const TokenSink& sink) {
  const Device device = model.memory.exec.device;
  Arena keep(device, arena_address_space(device), "keys, values and activations");
  return generate(model, keep, prompts, options, sink);
}

Generated generate(RankModel& model, Arena& keep, std::span<const Prompt> prompts,
                   const GenerationOptions& options, const TokenSink& sink) {
  const MeshSpec& spec = model.mesh.spec();
  UPMOE_CHECK(spec.pp == 1 && spec.cp == 1, "generation over {}", spec.str());
  UPMOE_CHECK(options.max_new_tokens >= 0 && options.chunk > 0, "{} new tokens, chunks of {}",
              options.max_new_tokens, options.chunk);
  if (const std::string wrong = refusal_of(model.config, prompts); !wrong.empty())
    fail(ExitCode::kBadInput, "{}", wrong);
  if (prompts.empty() || options.max_new_tokens == 0) {
    Generated none;
    none.tokens.resize(prompts.size());
    return none;
  }
  return Generator(model, keep, prompts, options, sink).run();
}

}  // namespace upmoe
