#pragma once
// A Hugging Face model directory: config.json, one model.safetensors or shards with an index, tokenizer files.

#include <filesystem>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "data/hf_names.h"
#include "data/safetensors.h"
#include "parallel/layout.h"

namespace upmoe {

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

}  // namespace upmoe
