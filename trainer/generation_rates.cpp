#include "trainer/generation_rates.h"

#include <algorithm>
#include <cmath>
#include <map>

#include "kernels/core/philox.h"

namespace upmoe {

namespace {

// New ones: the first step after the prompt, and one like all others.
constexpr std::int64_t kWarmUpTokens = 3;

Prompt drawn_prompt(std::int64_t row, std::int64_t tokens, std::int64_t vocab, std::uint64_t seed) {
  Prompt prompt{{}, row};
  for (std::int64_t i = 0; i < tokens; ++i)
    prompt.tokens.push_back(static_cast<std::int32_t>(
        philox(seed, static_cast<std::uint64_t>(row), static_cast<std::uint64_t>(i))[0] %
        static_cast<std::uint64_t>(vocab)));
  return prompt;
}

// One prompt as long as the timed ones, which go through the model one by one; the others only make rows.
std::vector<Prompt> warm_up_prompts(const RatesRequest& r, std::int64_t rows, std::int64_t vocab) {
  std::vector<Prompt> prompts;
  for (std::int64_t row = 0; row < rows; ++row)
    prompts.push_back(drawn_prompt(row, row == 0 ? r.prompt : 1, vocab, r.seed));
  return prompts;
}

std::vector<Prompt> timed_prompts(const RatesRequest& r, std::int64_t rows, std::int64_t vocab) {
  std::vector<Prompt> prompts;
  for (std::int64_t row = 0; row < rows; ++row) prompts.push_back(drawn_prompt(row, r.prompt, vocab, r.seed));
  return prompts;
}

// Of one model and concurrency: what the rounds gave.
struct Rounds {
  std::vector<double> prefill, decode, steps;
  GenerationMemory memory;
  void add(const Generated& g) {
    if (prefill.empty()) memory = g.memory;
    prefill.push_back(g.prefill_seconds);
    decode.push_back(g.decode_seconds);
    steps.insert(steps.end(), g.step_seconds.begin(), g.step_seconds.end());
  }
  GenerationRates rates(std::int64_t concurrency) const {
    return {concurrency,          quantile(prefill, 0.5), quantile(decode, 0.5),
            quantile(steps, 0.5), quantile(steps, 0.95),  memory};
  }
};

}  // namespace

double quantile(std::vector<double> values, double share) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  const double rank = std::ceil(share * static_cast<double>(values.size()));
  return values[static_cast<std::size_t>(std::max(1.0, rank)) - 1];
}

std::vector<std::int64_t> concurrency_up_to(std::int64_t most) {
  std::vector<std::int64_t> numbers;
  for (std::int64_t n = 1; n < most; n = checked_mul(n, 4)) numbers.push_back(n);
  numbers.push_back(most);
  return numbers;
}

std::vector<std::vector<GenerationRates>> measure_rates(std::span<const ModelToTime> models,
                                                        const RatesRequest& request, const SpeakWith& speak) {
  UPMOE_CHECK(request.prompt > 0 && request.output > 1 && request.rounds > 0,
              "requests of {} tokens in and {} out, {} rounds", request.prompt, request.output,
              request.rounds);
  std::map<std::int64_t, std::map<std::size_t, Rounds>> rounds;  // by concurrency, of the models that have it
  for (std::size_t m = 0; m < models.size(); ++m)
    for (const std::int64_t n : models[m].concurrency) rounds[n][m];
  for (int round = 0; round < request.rounds; ++round)
    for (auto& [n, in_turns] : rounds)
      for (auto& [m, of_model] : in_turns) {
        const std::int64_t vocab = models[m].vocab_size;
        if (round == 0)
          speak(m, warm_up_prompts(request, n, vocab),
                {.max_new_tokens = std::min(request.output, kWarmUpTokens)});
        of_model.add(speak(m, timed_prompts(request, n, vocab), {.max_new_tokens = request.output}));
      }
  std::vector<std::vector<GenerationRates>> rates(models.size());
  for (const auto& [n, in_turns] : rounds)
    for (const auto& [m, of_model] : in_turns) rates[m].push_back(of_model.rates(n));
  return rates;
}

}  // namespace upmoe
