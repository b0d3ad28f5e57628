#pragma once
// A run that goes on from a checkpoint, beside what is asked for now: what changed, and whether the model of
// the request is the one that is being trained. Rank 0's work.

#include <filesystem>
#include <string>
#include <vector>

#include "configs/config_diff.h"
#include "configs/model_config.h"
#include "data/model_source.h"
#include "data/token_dataset.h"

namespace upmoe {

// What a new run keeps in its checkpoints about the model it starts from. `weights`: null for random ones, of
// which the configuration is all there is.
std::string model_digest(const ModelConfig& config, const ModelSource* weights);

// Throws Error(kUsage) when the samples of a checkpoint are not those of whole steps.
void require_whole_steps(const RunConfig& now, std::int64_t step, std::int64_t samples);
// Throws Error(kBadInput) when the data is in another order than when `checkpoint` was written, as its `fingerprint`
// says; none: it has seen no data. `data_changes`: of the configuration, where it is known.
void require_same_data(const RunConfig& now, const TokenDataset& data,
                       const std::filesystem::path& checkpoint, const std::string& fingerprint,
                       const std::string& data_changes);

class Resumption {
 public:
  // Reads the checkpoint's record. Throws Error(kUsage) when model.path or model.init ask for another model
  // than the one that the run started from; a model that is gone is only told, nothing but its tokenizer
  // files is needed any more.
  Resumption(const std::filesystem::path& checkpoint, const RunConfig& now);

  // One line per key that changed, and what jumps because of it; empty when nothing did. The checkpoint of an
  // upcycled model that was put in place has no configuration to compare.
  std::vector<std::string> lines() const;
  // "data.seq_len: 16 -> 32, ...": the changes of a section; empty when there are none.
  std::string changes_of(const std::string& section) const;
  const std::vector<ConfigChange>& changes() const { return changes_; }
  const std::string& source() const { return source_; }  // where the model lies now

 private:
  void require_same_model(const std::string& source_digest, const std::string& model_config);
  void compare_teacher(const std::string& digest);
  std::string what_changes(const ConfigChange& change) const;

  const RunConfig& now_;
  std::filesystem::path checkpoint_;
  bool recorded_ = false;  // there is a configuration to compare
  RunConfig before_;
  bool same_teacher_ = false;  // as far as is known
  std::int64_t step_ = 0;
  std::string source_;
  std::vector<ConfigChange> changes_;
  std::vector<std::string> remarks_;
};

}  // namespace upmoe
