#pragma once
// Low-rank adapters in the folder that PEFT writes and reads: adapter_config.json and adapter_model.safetensors. Each
// of the model's modules has two tensors there, named after its weight in transformers,
//
//   base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight  [rank, inputs]
//   base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight  [outputs, rank]
//
// and routed experts one module for each, mlp.experts.7.gate_proj, as their weights have a tensor for each on disk.

#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "data/hf_writer.h"
#include "data/safetensors.h"

namespace upmoe {

// A tensor of such a folder, and what it is of one of our parameters: a whole factor, or that of one expert.
struct PeftTensor {
  std::string name;
  ParamSpec param;
  Box part;
  std::vector<std::int64_t> shape;
};
// Of a model with adapters, block by block.
std::vector<PeftTensor> peft_tensors_of(const ModelConfig& config);

struct PeftOutput {
  std::filesystem::path dir;
  std::vector<std::filesystem::path> inputs;  // folders that are read; `dir` may lie in none of them
  DType dtype = DType::kF32;
  // The model that the adapters stand beside: where it lies, and its digest (digest_of in model_source.h), which goes
  // into the metadata of the tensors' file; either may be empty.
  std::string base, base_digest;
};
// Appears under its name when it is complete. `read` gives whole boxes of `config`'s adapters.
void write_peft_adapter(const PeftOutput& output, const ModelConfig& config, const ReadTensor& read);

// Opened for reading, whoever wrote it. Throws Error(kBadInput) where the folder holds no adapter of `base`, with every
// difference in one message, or one that asks for what merging does not do (DoRA, ranks by module, biases, ...).
class PeftAdapter {
 public:
  PeftAdapter(const std::filesystem::path& dir, const ModelConfig& base);
  const ModelConfig& config() const { return config_; }  // of the base, with its adapters
  // What it says of the model that it was trained beside; either may be empty.
  const std::string& base() const { return base_; }
  const std::string& base_digest() const { return base_digest_; }
  // Any box of an adapter's factor, converted to out's dtype.
  void read(const ParamSpec& param, const Box& box, TensorView out) const;

 private:
  void read_form();
  void check_tensors() const;

  std::filesystem::path dir_;
  ModelConfig config_;
  std::string base_, base_digest_;
  std::unique_ptr<SafetensorsFile> file_;
  std::map<std::string, std::vector<PeftTensor>> tensors_;  // by our parameter
};

}  // namespace upmoe
