#pragma once
// How fast models generate: requests of one length, so many at once, the models in turns.

#include "trainer/generation.h"

namespace upmoe {

struct RatesRequest {
  std::int64_t prompt = 1000, output = 1000;  // tokens of a request; output: 2 or more
  int rounds = 3;
  std::uint64_t seed = 1;  // of the prompts' tokens
};

struct ModelToTime {
  std::int64_t vocab_size = 0;
  std::vector<std::int64_t> concurrency = {1};  // requests at once
};

// 1, 4, 16, 64, ... as far as they are below `most`, and `most`.
std::vector<std::int64_t> concurrency_up_to(std::int64_t most);

// Of one model, so many requests at once. Medians over the rounds.
struct GenerationRates {
  std::int64_t concurrency = 0;
  double prefill_seconds = 0;    // of all prompts, one behind the other, with the first new token of each
  double decode_seconds = 0;     // of the steps that make the others
  double step_seconds = 0;       // the median step of all rounds: what a token takes
  double slow_step_seconds = 0;  // 95 of 100 steps take no longer
  GenerationMemory memory;       // of the first round
};

// Generates with a model, by its number.
using SpeakWith = std::function<Generated(std::size_t model, std::span<const Prompt> prompts,
                                          const GenerationOptions& options)>;

// For each model its rates at each of its concurrencies, rising. In every round and at every concurrency the models
// that have it take turns, so that what a machine does meanwhile meets them all. Before a model is timed for the first
// time at a concurrency it generates a few tokens, not timed, with a prompt as long and as many rows.
std::vector<std::vector<GenerationRates>> measure_rates(std::span<const ModelToTime> models,
                                                        const RatesRequest& request, const SpeakWith& speak);

// The smallest of the values that `share` of them do not pass; of no values 0.
double quantile(std::vector<double> values, double share);

}  // namespace upmoe
