#pragma once
// Rows of routers from prompts: an expert is chosen for what looks like the text that it is for.

#include <cstdint>
#include <filesystem>
#include <vector>

#include "upcycle/calibration.h"

namespace upmoe {

struct PromptRequest {
  std::vector<std::filesystem::path>
      files;  // token files; each for an equal part of the experts, in their order
  std::int64_t seq_len = 128, sequences = 64;
};

// Of every layer of the dense model, for each file the mean of what the FFN reads over its first sequences, scaled to
// length 1: the rows of its part of `experts`. On this rank alone, in fp32 on the CPU. Throws Error(kUsage) when the
// files do not divide the experts.
Calibration prompt_rows(const std::filesystem::path& dense, int experts, const PromptRequest& request);

}  // namespace upmoe
