#pragma once
// What can be wrong between a run, its model and the number of ranks.

#include <cstdint>
#include <string>
#include <vector>

#include "configs/model_config.h"
#include "configs/run_config.h"
#include "kernels/core/tensor.h"

namespace upmoe {

// The run as it goes on a device that was chosen for it: what is a limit of GPUs alone is none on a CPU.
RunConfig on_device(RunConfig run, Device device);

// Problems that need the number of ranks or the model: batch against dp, axes not built yet, sequence
// length against positions, limits of GPUs unless run.device is cpu. All of them, one sentence each; empty when the run
// is possible.
std::vector<std::string> problems_of(const RunConfig& run, const ModelConfig& model, int world_size);

// Why tp ranks cannot share a layer's heads and widths, one sentence for each, behind `key`.
std::vector<std::string> tensor_axis_problems(const std::string& key, int tp, const ModelConfig& model);

// Of the ranks that parallel.ep divides a layer's experts over, those that get none: as many as it has more than the
// model has experts. They are possible and wait where the others compute.
std::int64_t ranks_without_experts(const RunConfig::Parallel& parallel, const ModelConfig& model);

// Those of n up to `most`, rising.
std::vector<std::int64_t> divisors(std::int64_t n, std::int64_t most);

}  // namespace upmoe
