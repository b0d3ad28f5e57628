#pragma once
// What recipes ask tokens about the dense model, looked up with the trainer's layers. On this rank alone, in fp32 on
// the CPU, with the model in memory.

#include <cstdint>
#include <filesystem>
#include <vector>

#include "configs/upcycle_config.h"
#include "upcycle/calibration.h"

namespace upmoe {

struct TokenRequest {
  std::vector<std::filesystem::path> files;  // token files
  std::int64_t seq_len = 128, sequences = 64;
};

// router.method prompts: of every layer and each file the mean of what the FFN reads over its first sequences, scaled
// to length 1, as the rows of an equal part of the experts, in the order of the files. Throws Error(kUsage) when the
// files do not divide them.
// experts.method cluster: clustered_layer() of every layer over the first sequences of one file, with what its FFN
// reads in memory.
Calibration calibration_of(const UpcycleConfig& config, const std::filesystem::path& dense,
                           const TokenRequest& prompts, const TokenRequest& calibrate);

}  // namespace upmoe
