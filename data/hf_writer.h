#pragma once
// A Hugging Face model directory to be written: where each tensor goes, and the directory at once.

#include <cstdint>
#include <filesystem>
#include <functional>
#include <set>
#include <string>
#include <vector>

#include "configs/param_table.h"
#include "data/safetensors.h"
#include "parallel/layout.h"

namespace upmoe {

// Where each tensor of a directory to be written goes. Shards hold at most max_shard_bytes of tensor data (a
// single larger tensor gets a shard of its own); one shard = model.safetensors without index. Tensors are of `dtype`,
// those that are fp32 in any case (HfTensor::fp32) aside.
struct HfLayout {
  struct File {
    std::string name;
    std::string header;                     // bytes that precede the data
    std::vector<SafetensorsEntry> entries;  // offsets assigned
    std::uint64_t bytes = 0;                // whole file
  };
  std::vector<File> files;
  std::set<std::string> zeros;   // names of tensors that are nothing else (HfTensor::zeros)
  std::string index_json;        // empty for one file
  std::uint64_t total_size = 0;  // tensor bytes
};
HfLayout plan_hf_layout(const ModelConfig& config, DType dtype, std::uint64_t max_shard_bytes);

// Writes a whole model directory: config.json, shards, index, and what `companions` holds of
// data/companions.h (empty = none). Streams: `read` fills one part of a tensor at a time (HfTensor::part
// of the parameter it belongs to). Appears under its name when it is complete (data/staged_directory.h), after a
// check for free disk before the first byte. `inputs`: folders that are read; `dir` may lie in none of them.
using ReadTensor = std::function<void(const ParamSpec& param, const Box& part, TensorView out)>;
struct HfOutput {
  std::filesystem::path dir, companions;
  std::vector<std::filesystem::path> inputs;
  DType dtype = DType::kBF16;
  std::uint64_t max_shard_bytes = 4'000'000'000ull;
};
void write_hf_model(const HfOutput& output, const ModelConfig& config, const ReadTensor& read);

}  // namespace upmoe
