#pragma once
// "75 % less training cost than Qwen1.5-7B": what the announcement of Qwen1.5-MoE-A2.7B may have meant, each reading
// with its formula and what it gives. How many tokens either model saw, on which machines and in how many hours was
// never published; what is taken from elsewhere says so in its line.

#include <optional>
#include <string>
#include <vector>

#include "trainer/cost/model_cost.h"

namespace upmoe {

// The three models at one sequence length.
struct ClaimedModels {
  ModelCost mixture, dense, source;  // A2.7B, 7B, and the 1.8B that it was made of
};

// Published or measured elsewhere, not computed.
struct ClaimFacts {
  double corpus_tokens = 3e12;  // of Qwen1.5 (Qwen2's report); of either model's own run nothing is known
  double claimed_cost = 0.25;   // of the 7B's; the first revision of the model card said 0.20
  double first_claimed_cost = 0.20;
  double mixture_mfu = 0.480;  // of this program on one H200 (docs/gpu.md)
  double dense_mfu = 0.55;     // given: what a well-run dense 7B reaches
  double peak_flops_per_s = 989.5e12;
};

struct ClaimReading {
  std::string reading, formula;
  std::int64_t seq_len = 0;      // 0: of none
  std::optional<double> saving;  // of the 7B's cost, 0 to 1 where it is one
  std::optional<double> tokens;  // the mixture's tokens, of the 7B's, at which it holds
  std::string result;            // in words
};

// `by_length`: one or more sequence lengths, each with all three models.
std::vector<ClaimReading> claim_readings(const std::vector<ClaimedModels>& by_length,
                                         const ClaimFacts& facts);

// Another upcycled model whose maker printed FLOPs, but not of what: Marco-Nano, made of Qwen3-0.6B.
struct CardFacts {
  double printed_flops = 1.40e23;  // its model card
  double tokens = 5.1e12;          // arXiv 2604.25578
  double source_tokens = 36e12;    // Qwen3's technical report
};

// Its printed FLOPs beside 6 N tokens, without and with the source's. That the card charges the source is inferred.
std::vector<ClaimReading> card_readings(const ParamCounts& mixture, const ParamCounts& source,
                                        const CardFacts& facts);

}  // namespace upmoe
