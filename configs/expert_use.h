#pragma once
// How much a mixture's routers use of its experts, by what is configured alone.

#include "configs/model_config.h"

namespace upmoe {

// ceil(factor * choices / experts), at least 1: what an expert takes of a pool with as many choices, k of a token
// counted k times (Lepikhin et al. 2020, Fedus et al. 2021). Factors are decimal numbers: what rounding adds to a whole
// one is no assignment.
std::int64_t expert_capacity(double factor, std::int64_t choices, std::int64_t experts);

// Of RouterKind::kExpertChoice (Zhou et al. 2022): experts of a token on the mean, and with so many the tokens of a
// group of `tokens` that each expert takes, rounded up.
double choices_on_the_mean(const ModelConfig& model);
std::int64_t chosen_of_group(double choices, std::int64_t tokens, std::int64_t experts);

// All experts together compute `rows` rows for so many tokens, on the mean.
struct ExpertUse {
  std::int64_t rows = 0, tokens = 1;
  double per_token() const { return static_cast<double>(rows) / static_cast<double>(tokens); }
};
ExpertUse expert_use(const ModelConfig& model);

// Sequences that a micro-batch has at least.
std::int64_t least_sequences(const ModelConfig& model);

}  // namespace upmoe
