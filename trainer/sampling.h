#pragma once
// Which token comes next, from its logits.

#include <cstdint>
#include <span>

namespace upmoe {

// How. temperature 0: the most likely one, of equals the lowest. Else a token is drawn with the probabilities of
// softmax(logits / temperature), from among the top_k likeliest (0: all) and of these the fewest that together have at
// least top_p of what they all have (1: all); the likeliest is always among them.
struct SamplingRule {
  double temperature = 0;
  std::int64_t top_k = 0;
  double top_p = 1;
  std::uint64_t seed = 1;
};

// What a draw goes by, beside the seed: so that a row gets the same tokens beside any others, and on any ranks.
struct DrawPlace {
  std::int64_t row = 0, position = 0;  // of the request; of the token that is drawn
};

// A pure function. Logits that are not numbers, or no finite one among them, throw Error(kNumeric).
std::int32_t next_token(std::span<const float> logits_V, const SamplingRule& rule, const DrawPlace& place);

}  // namespace upmoe
