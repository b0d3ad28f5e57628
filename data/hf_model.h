#pragma once
// A Hugging Face model directory: config.json, one model.safetensors or shards with an index, tokenizer files.

#include <filesystem>
#include <functional>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "configs/families/family.h"
#include "data/safetensors.h"
#include "parallel/layout.h"

namespace upmoe {

// One tensor on disk and the part of one of our parameters it holds: in Qwen2's mixtures, for
// layers.3.moe.gate_up_EF2D, expert 7, the gates, model.layers.3.mlp.experts.7.gate_proj.weight. `part` is that
// part as a box of the global parameter; its row-major order is the order of the elements on disk.
struct HfTensor {
  std::string name;
  std::vector<std::int64_t> shape;  // on disk
  Box part;
  Half half = Half::kWhole;
  std::int64_t expert = -1;  // -1: not of one routed expert
  // Part of no parameter: transformers makes the modules of a shared expert of width 0, too, a gate included.
  // Written as zeros; a file need not hold it, and its values change nothing.
  bool zeros = false;
  std::int64_t elements() const;
};
// Those of one parameter, named as transformers writes them; none of a buffer that the family does not have.
std::vector<HfTensor> hf_tensors_of(const ModelConfig& config, const ParamSpec& param);
// Every tensor of a model in the order in which transformers' state dict lists them (embedding, layers, norm, head).
std::vector<HfTensor> hf_tensors_of(const ModelConfig& config);

// Opened for reading. The weights are found as transformers finds them: model.safetensors, else the files of
// model.safetensors.index.json. Opening checks the index (plain file names inside the directory), every
// header, and every tensor against the config: missing, extra, wrong shape or dtype are listed all at once in
// one Error(kBadInput). A head beside tied embeddings must be a copy of them.
class HfModel {
 public:
  explicit HfModel(const std::filesystem::path& dir);
  const ModelConfig& config() const { return config_; }
  const std::filesystem::path& dir() const { return dir_; }
  // Any box of a parameter, converted to out's dtype (fp32 or bf16; from F32, BF16 or F16). out: box.extent elements.
  void read(const ParamSpec& param, const Box& box, TensorView out) const;
  // Raw access for streaming: the file and entry that hold a tensor; throws when absent.
  std::pair<const SafetensorsFile*, const SafetensorsEntry*> locate(const std::string& tensor) const;
  std::uint64_t data_bytes() const;  // sum over tensors
  std::vector<const SafetensorsEntry*> tensors() const;
  // False: the file holds it, and the model has it from elsewhere or not at all (rotary frequencies, the copy
  // of tied embeddings, a shared expert of width 0).
  bool uses(const std::string& tensor) const { return used_.contains(tensor); }

 private:
  void check_tied_head() const;
  void check_against(const std::map<std::string, std::string>& file_of,
                     const std::vector<std::string>& names) const;
  std::filesystem::path dir_;
  ModelConfig config_;
  std::vector<SafetensorsFile> files_;
  std::map<std::string, std::pair<std::size_t, std::size_t>> index_;  // name -> file, entry
  std::set<std::string> used_;
};

// Where each tensor of a directory to be written goes. Shards hold at most max_shard_bytes of tensor data (a
// single larger tensor gets a shard of its own); one shard = model.safetensors without index.
struct HfLayout {
  struct File {
    std::string name;
    std::string header;                     // bytes that precede the data
    std::vector<SafetensorsEntry> entries;  // offsets assigned
    std::uint64_t bytes = 0;                // whole file
  };
  std::vector<File> files;
  std::set<std::string> zeros;   // names of tensors (HfTensor::zeros)
  std::string index_json;        // empty for one file
  std::uint64_t total_size = 0;  // tensor bytes
};
HfLayout plan_hf_layout(const ModelConfig& config, DType dtype, std::uint64_t max_shard_bytes);

// Writes a whole model directory: config.json, shards, index, and what `companions` holds of
// data/companions.h (empty = none). Streams: `read` fills one tensor at a time (its HfTensor and the
// parameter it belongs to). Appears under its name when it is complete (data/staged_directory.h), after a
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
