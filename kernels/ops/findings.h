#pragma once
// What an op may find wrong in the values of its input, in words that are the same on every device.

#include <cstdint>
#include <string_view>

#include "kernels/core/check.h"

namespace upmoe {

[[noreturn]] inline void fail_token(std::int32_t token, std::int64_t position, std::int64_t vocabulary) {
  fail(ExitCode::kBadInput,
       "token {} at position {} of the batch is outside the vocabulary [0, {}): "
       "the data was made with another tokenizer; tokenise it with the model's own",
       token, position, vocabulary);
}

[[noreturn]] inline void fail_target(std::int32_t target, std::int64_t position, std::int64_t vocabulary) {
  fail(ExitCode::kBadInput,
       "target {} at position {} of the chunk is outside the vocabulary [0, {}) and is not -1 "
       "(ignored): the data was made with another tokenizer; tokenise it with the model's own",
       target, position, vocabulary);
}

// `what`: what the logit is.
[[noreturn]] inline void fail_logit(std::int64_t token, std::int64_t expert, std::string_view what) {
  fail(ExitCode::kNumeric,
       "router logit of token row {} and expert {} is {}: weights or what they compute are not finite. A "
       "training that "
       "ends so has diverged: lower the learning rate or restart from an earlier checkpoint",
       token, expert, what);
}

[[noreturn]] inline void fail_index(std::int32_t index, std::int64_t row, std::int64_t limit) {
  fail(ExitCode::kFailure, "an index of row {} is {}, expected less than {}; this is a bug", row, index,
       limit);
}

}  // namespace upmoe
