#pragma once
// Generation: tokens that continue prompts, with the keys and values of all tokens so far kept.
//
// A prompt goes through the model by itself, in chunks that depend on its own length alone; then every step takes one
// token of each row that is not at its end, and on the CPU computes row by row (Exec). So a row's tokens and logits are
// the same alone and beside others: to the bit on the CPU; docs/inference.md says how far on a GPU.
//
// Rows that have no room beside the others wait: they go in waves, each of them to its end before the next one begins.

#include <functional>
#include <span>
#include <vector>

#include "trainer/rank_model.h"
#include "trainer/sampling.h"

namespace upmoe {

struct Prompt {
  std::vector<std::int32_t> tokens;  // one or more
  std::int64_t row = 0;              // what its draws go by (DrawPlace)
  std::int64_t length() const { return static_cast<std::int64_t>(tokens.size()); }
};

struct GenerationOptions {
  std::int64_t max_new_tokens = 64;
  std::vector<std::int32_t> stop = {};  // a row ends behind one of these
  SamplingRule sampling = {};
  std::int64_t chunk = 2048;  // tokens of a prompt at once
  std::int64_t rows = 0;      // that a rank has under way at once, at most; 0: all
};

// A row's next token, as soon as it is known and in the order of its positions, with the logits it was taken from;
// `prompt` is its number. On one rank alone for each row: the first along tp, of the data-parallel rank that has it;
// prompt 0 is on rank 0.
using TokenSink =
    std::function<void(std::size_t prompt, std::int32_t token, std::span<const float> logits_V)>;

// Bytes of this rank.
struct GenerationMemory {
  std::size_t weights = 0;
  std::size_t keys = 0;   // what is kept of tokens: keys and values of all rows
  std::size_t work = 0;   // activations at their most; temporary memory too, since the model was made
  std::int64_t rows = 0;  // that `keys` has room for
};

struct Generated {
  // The new ones of each prompt, a token that ended it included.
  std::vector<std::vector<std::int32_t>> tokens;
  std::int64_t prompt_tokens = 0, new_tokens = 0;
  double prefill_seconds = 0, decode_seconds = 0;  // the first new token of each row is of the former
  std::vector<double> step_seconds;  // of the steps of the latter, each a new token of every row
  GenerationMemory memory;
  double tokens_per_s() const;  // new ones, over both
};

// Experts over as many of the ranks as divide them, as in evaluation; rows are dealt to the groups of tp ranks. Throws
// Error(kUsage) where `tp` does not divide the ranks or the heads.
MeshSpec generation_mesh(const ModelConfig& config, int ranks, int tp);

// What cannot be generated from, in words; empty: nothing is wrong.
std::string refusal_of(const ModelConfig& config, std::span<const Prompt> prompts);

// Collective, with the same arguments but `sink` on every rank; the same tokens on every rank. The model has one stage,
// no cp and no gradients. Throws Error(kBadInput) with refusal_of()'s words.
Generated generate(RankModel& model, std::span<const Prompt> prompts, const GenerationOptions& options,
                   const TokenSink& sink = {});
// The same, with what it keeps of tokens and its activations in `keep`, of the model's device: for who generates again
// and again, as memory that was used before is there at once. Left as it was found.
Generated generate(RankModel& model, Arena& keep, std::span<const Prompt> prompts,
                   const GenerationOptions& options, const TokenSink& sink = {});

}  // namespace upmoe
