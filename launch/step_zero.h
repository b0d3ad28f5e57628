#pragma once
// What a mixture predicts before its first step of training, beside its source.

#include <cstdint>
#include <filesystem>

#include "configs/run_choices.h"
#include "upcycle/report.h"

namespace upmoe {

struct StepZeroRequest {
  std::filesystem::path tokens;  // token file
  std::int64_t seq_len = 512, sequences = 16;
  Precision precision = Precision::kFp32;
};

// Throws Error(kBadInput) where measure_step_zero would for the tokens' sake: before a mixture is made, whose making
// can take far longer than it takes to look.
void require_step_zero_tokens(const std::filesystem::path& source, const StepZeroRequest& request);

// On this rank alone, on the CPU, with both models in memory. Throws Error(kBadInput) when tokens and models do not
// fit.
StepZero measure_step_zero(const std::filesystem::path& source, const std::filesystem::path& made,
                           const StepZeroRequest& request);

}  // namespace upmoe
