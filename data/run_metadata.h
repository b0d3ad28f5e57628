#pragma once
// What a checkpoint says of the run that wrote it: the "run" object of its manifest, written and read here alone.

#include <cstdint>
#include <map>
#include <optional>
#include <string>

namespace upmoe {

class ShardStore;

struct RunMetadata {
  std::int64_t step = 0;         // finished optimizer steps
  std::int64_t samples = 0;      // sequences consumed: where the data order goes on
  std::int64_t tokens = 0;       // in those
  std::string model_config;      // the text of a config.json
  std::string source;            // model directory the run started from: tokenizer files come from there
  std::string data_fingerprint;  // of the data order; empty: no data was seen
  // Of training runs alone, not of what upcycling writes.
  std::optional<std::string> config;          // run configuration, as YAML
  std::optional<std::string> mesh;            // in words
  std::optional<std::string> source_digest;   // of the source; not in checkpoints of earlier programs
  std::optional<std::string> teacher_digest;  // of the teacher, where the run has one
  // Of parameters whose moments began later than the run: behind which step. Bias correction counts from there.
  std::map<std::string, std::int64_t> moments_begun = {};
};

std::string run_metadata_json(const RunMetadata& run);
// Keys of newer programs are passed over. Throws Error(kBadInput) that names `where` and the key.
RunMetadata parse_run_metadata(const std::string& json, const std::string& where);
RunMetadata run_metadata_of(const ShardStore& store);

}  // namespace upmoe
