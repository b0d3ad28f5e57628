#include "trainer/resumption.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "data/checkpoint_folder.h"
#include "data/run_metadata.h"
#include "data/shard_store.h"
#include "kernels/core/philox.h"
#include "trainer/schedule.h"

namespace upmoe {

namespace fs = std::filesystem;
using nlohmann::json;

namespace {

// "num_experts: 8 -> 4, ...": keys of two configurations that differ; a few are enough.
std::string config_differences(const ModelConfig& one, const ModelConfig& two) {
  if (one.model_type != two.model_type)  // nearly every key differs, and none of them says why
    return fmt::format("a model of another family: {}, not {}", two.model_type, one.model_type);
  const json before = json::parse(function_of(one)), after = json::parse(function_of(two));
  std::string words;
  int count = 0;
  for (const auto& [key, value] : before.items()) {
    const json other = after.contains(key) ? after[key] : json();
    if (other != value && ++count <= 5)
      words += fmt::format("{}{}: {} -> {}", count > 1 ? ", " : "", key, value.dump(), other.dump());
  }
  for (const auto& [key, value] : after.items())
    if (!before.contains(key) && ++count <= 5)
      words += fmt::format("{}{}: none -> {}", count > 1 ? ", " : "", key, value.dump());
  return words;
}

bool same_place(const std::string& one, const std::string& two) {
  if (one == two) return true;
  std::error_code error;
  const fs::path first = fs::weakly_canonical(one, error);
  if (error) return false;  // what cannot be followed leads nowhere, not to the same place
  const fs::path second = fs::weakly_canonical(two, error);
  return !error && first == second;
}

}  // namespace

std::string model_digest(const ModelConfig& config, const ModelSource* weights) {
  if (weights != nullptr) return digest_of(*weights);
  // That of model.path: its routers are the run's, and are compared in their own words.
  return fmt::format("{:016x}", philox_key(2, function_without_routers(config)));
}

void require_whole_steps(const RunConfig& now, std::int64_t step, std::int64_t samples) {
  if (samples != step * now.train.global_batch)
    fail(ExitCode::kUsage,
         "train.global_batch: the checkpoint consumed {} samples in {} steps, which {} per step does "
         "not give; restore it, or start another run.dir",
         samples, step, now.train.global_batch);
}

void require_same_data(const RunConfig& now, const TokenDataset& data, const fs::path& checkpoint,
                       const std::string& fingerprint, const std::string& data_changes) {
  // Empty: an upcycled model put in place as step 0, which has seen no data.
  if (fingerprint.empty() || data.continues(fingerprint)) return;
  fail(ExitCode::kBadInput,
       "the data changed since {}: {}; restore data.* of {}/config.yaml, or start another run.dir",
       checkpoint.string(),
       data_changes.empty() ? "the token files are others, or have other contents" : data_changes,
       fs::path(now.run.dir).string());
}

Resumption::Resumption(const fs::path& checkpoint, const RunConfig& now)
    : now_(now), checkpoint_(checkpoint) {
  const RunMetadata record = run_metadata_of(ShardStore(checkpoint));
  step_ = record.step;
  source_ = record.source;
  recorded_ = record.config.has_value();
  if (!recorded_) {
    remarks_.push_back(
        fmt::format("model.path is not read: the weights are those of {}", checkpoint.string()));
    return;
  }
  before_ = recorded_run_config(*record.config);
  changes_ = changes_between(before_, now);
  if (before_.model.init != now.model.init)
    fail(ExitCode::kUsage,
         "model.init: {}, but the run in {} started with {} and "
         "goes on from {}; restore it, or start another run.dir",
         name_of(now.model.init), now.run.dir, name_of(before_.model.init), checkpoint.string());
  require_same_model(record.source_digest.value_or(""), record.model_config);
  if (record.teacher_digest && now.train.teacher.given()) compare_teacher(*record.teacher_digest);
}

// It may be another one from here on, as any key of the loss may; but not without a word.
void Resumption::compare_teacher(const std::string& digest) {
  const std::string& model = now_.train.teacher.model;
  same_teacher_ = digest_of(*open_model(model)) == digest;
  if (!same_teacher_ && model == before_.train.teacher.model)
    remarks_.push_back(fmt::format(
        "train.teacher.model: {} holds another model than when the checkpoint was written", model));
}

void Resumption::require_same_model(const std::string& source_digest, const std::string& model_config) {
  const std::string asked = fs::absolute(now_.model.path).string();
  // A model directory may have been moved: the path differs, the digest decides.
  const bool same = same_place(asked, source_);
  const std::string advice = fmt::format(
      "{} goes on from {} and reads no other weights; set model.path={}{}, or train this model in "
      "another run.dir",
      now_.run.dir, checkpoint_.string(), source_, same ? " as it was" : "");
  std::string differs;
  try {
    const ModelConfig started = parse_model_config(model_config, checkpoint_.string());
    std::unique_ptr<ModelSource> weights;
    ModelConfig config;
    if (now_.model.init == ModelInit::kRandom) {
      config = read_model_config(asked);
    } else {
      weights = open_model(asked);
      config = weights->config();
    }
    // The run's, not the model's (require_same_router of configs/router_record.h).
    config.router = started.router;
    config.router_bias = started.router_bias;
    config.router_load = started.router_load;
    config.lora = started.lora;
    differs = config_differences(started, config);
    // Checkpoints of earlier programs have no digest: then the configuration decides.
    if (differs.empty() && !source_digest.empty() && model_digest(config, weights.get()) != source_digest)
      differs = "the weights differ";
  } catch (const Error& e) {
    if (!same) fail(ExitCode::kUsage, "model.path: {}; {}", e.what(), advice);
    remarks_.push_back(fmt::format(
        "the model that the run started from cannot be read any more ({}); the run does not need it, "
        "an export will lack its tokenizer files",
        e.what()));
    return;
  }
  // A run that this one started from may have gone on: its newest checkpoint is another one now.
  const bool moves_on = same && is_run_directory(asked);
  if (!differs.empty() && moves_on)
    remarks_.push_back(
        fmt::format("{} holds another checkpoint than this run started from", now_.model.path));
  if (!differs.empty() && !moves_on)
    fail(ExitCode::kUsage, "model.path: {} is not the model that this run started from ({}): {}; {}",
         now_.model.path, source_, differs, advice);
  source_ = asked;
}

std::string Resumption::what_changes(const ConfigChange& change) const {
  if (change.key == "run.seed") return " (the weights stay those of the checkpoint)";
  if (change.key == "freeze") return " (moments of what did not train so far begin at zero)";
  if (change.key == "router.dtype" && now_.train.precision == Precision::kBf16)
    return " (the routers are converted: their fp32 values and their moments go on)";
  if (change.key == "model.path" || (change.key == "train.teacher.model" && same_teacher_))
    return " (the same model)";
  return "";
}

std::vector<std::string> Resumption::lines() const {
  std::vector<std::string> all;
  for (const ConfigChange& change : changes_) all.push_back(change.str() + what_changes(change));
  if (recorded_) {
    // The step that comes next, as it would have been and as it is.
    const double expected = learning_rate(before_, step_ + 1), next = learning_rate(now_, step_ + 1);
    if (std::abs(next - expected) > 1e-6 * std::max(next, expected))
      all.push_back(fmt::format("the learning rate goes from {:.3g} at step {} to {:.3g} at step {}",
                                learning_rate(before_, step_), step_, next, step_ + 1));
  }
  all.insert(all.end(), remarks_.begin(), remarks_.end());
  return all;
}

std::string Resumption::changes_of(const std::string& section) const {
  std::string words;
  for (const ConfigChange& change : changes_)
    if (change.key.starts_with(section + ".")) words += (words.empty() ? "" : ", ") + change.str();
  return words;
}

}  // namespace upmoe
