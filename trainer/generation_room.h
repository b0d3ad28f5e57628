#pragma once
// How much is kept of tokens, and how many rows there is room for.

#include "trainer/generation.h"

namespace upmoe {

// Slots of a cache that has room for the longest of `which` of the prompts, with its answer; with a window, for what it
// reaches over and the tokens that come at once.
std::int64_t slots_of(const ModelConfig& config, std::span<const Prompt> prompts,
                      std::span<const std::size_t> which, const GenerationOptions& options);

// How many rows a rank may have under way: on a CPU 64, on a GPU as rows_in() says of its memory, the fewest of any
// rank. Collective.
std::int64_t rows_that_fit(RankModel& model, std::span<const Prompt> prompts,
                           const GenerationOptions& options);

// For whose keys, values and logits there is room in a share of so many bytes, beside this rank's weights, when all are
// as long as the longest; 1 at least. The rest of the memory is for activations and what libraries take.
constexpr double kMemoryOfRows = 0.8;
std::int64_t rows_in(const RankModel& model, std::span<const Prompt> prompts,
                     const GenerationOptions& options, double device_bytes);

}  // namespace upmoe
