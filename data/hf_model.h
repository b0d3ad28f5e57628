#pragma once
// A Hugging Face model directory: config.json, one model.safetensors or shards with an index, tokenizer
// files.

#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "configs/model_config.h"
#include "configs/param_table.h"
#include "data/safetensors.h"
#include "parallel/layout.h"

namespace upmoe {

// One tensor on disk and the part of one of our parameters it holds: for layers.3.moe.gate_up_EF2D, expert 7,
// pair 0 it is model.layers.3.mlp.experts.7.gate_proj.weight. `part` is that part as a box of the global
// parameter; its row-major order is the order of the elements on disk.
struct HfTensor {
  std::string name;
  std::vector<std::int64_t> shape;  // on disk
  Box part;
};
std::vector<HfTensor> hf_tensors_of(const ParamSpec& param);  // names as transformers writes them
// Every tensor of a model in the order in which transformers' state dict lists them (embedding, layers, norm,
// head).
std::vector<HfTensor> hf_tensors_of(const ModelConfig& config);

// Opened for reading. Opening checks the index (plain file names inside the directory), every header, and
// every tensor against the config: missing, extra, wrong shape or dtype are listed all at once in one
// Error(kBadInput).
class HfModel {
 public:
  explicit HfModel(const std::filesystem::path& dir);
  const ModelConfig& config() const { return config_; }
  const std::filesystem::path& dir() const { return dir_; }
  // Any box of a parameter, converted to out's dtype (fp32 or bf16; from F32, BF16 or F16). out: box.extent
  // elements.
  void read(const ParamSpec& param, const Box& box, TensorView out) const;
  // Raw access for streaming: the file and entry that hold a tensor; throws when absent.
  std::pair<const SafetensorsFile*, const SafetensorsEntry*> locate(const std::string& tensor) const;
  std::uint64_t data_bytes() const;  // sum over tensors
  std::vector<const SafetensorsEntry*> tensors() const;

 private:
  void check_against(const std::map<std::string, std::string>& file_of,
                     const std::vector<std::string>& names) const;
  std::filesystem::path dir_;
  ModelConfig config_;
  std::vector<SafetensorsFile> files_;
  std::map<std::string, std::pair<std::size_t, std::size_t>> index_;  // name -> file, entry
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
  std::string index_json;        // empty for one file
  std::uint64_t total_size = 0;  // tensor bytes
};
HfLayout plan_hf_layout(const ModelConfig& config, DType dtype, std::uint64_t max_shard_bytes);

// Writes a whole model directory: config.json, shards, index, and the tokenizer and generation files found in
// `companions` (empty = none). Streams: `read` fills one tensor at a time (its HfTensor and the parameter it
// belongs to). Goes to DIR.tmp first, fsynced, checked for free disk before the first byte, then renamed;
// refuses an existing non-empty target.
using ReadTensor = std::function<void(const ParamSpec& param, const Box& part, TensorView out)>;
void write_hf_model(const std::filesystem::path& dir, const ModelConfig& config, DType dtype,
                    const ReadTensor& read, const std::filesystem::path& companions,
                    std::uint64_t max_shard_bytes = 4'000'000'000ull);
// Names of the tokenizer, generation and licence files carried along with a model.
const std::vector<std::string>& companion_files();
void require_free_space(const std::filesystem::path& dir,
                        std::uint64_t bytes);  // Error(kBadInput) with both figures

}  // namespace upmoe
