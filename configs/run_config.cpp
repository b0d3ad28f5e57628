#include "configs/run_config.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <utility>

#include "configs/run_notes.h"
#include "configs/run_schema.h"
#include "kernels/core/tensor.h"

namespace upmoe {
namespace {

// Rules between keys that need neither the model nor the number of ranks.
void check_together(const RunConfig& run, const Schema& schema, Problems& problems) {
  const auto& t = run.train;
  if (t.global_batch % t.micro_batch != 0) {
    problems.add(schema.place_of("train.micro_batch"),
                 fmt::format("{} does not divide train.global_batch = {}", t.micro_batch, t.global_batch));
  }
  if (const auto& c = run.checkpoint; c.keep_every > 0 && (c.every == 0 || c.keep_every % c.every != 0)) {
    problems.add(schema.place_of("checkpoint.keep_every"),
                 fmt::format("{} is no multiple of checkpoint.every = {}: what stays is what is written",
                             c.keep_every, c.every));
  }
  constexpr std::int64_t kMaxRows = std::numeric_limits<std::int32_t>::max();
  if (t.micro_batch > kMaxRows / run.data.seq_len) {
    problems.add(schema.place_of("train.micro_batch"),
                 fmt::format("{} sequences of {} tokens are more than {} tokens in one micro-batch",
                             t.micro_batch, run.data.seq_len, kMaxRows));
  }
  const double tokens = static_cast<double>(t.steps) * static_cast<double>(t.global_batch) *
                        static_cast<double>(run.data.seq_len);
  if (tokens > 9e18) {
    problems.add(schema.place_of("train.steps"),
                 fmt::format("{} steps of {} sequences of {} tokens overflow 64 bits", t.steps,
                             t.global_batch, run.data.seq_len));
  }
}

}  // namespace

RunConfig parse_run_config(const std::string& yaml, const std::string& where,
                           const std::vector<std::string>& overrides) {
  RunConfig run;
  run.origin = where;
  Problems problems;
  Schema schema = run_schema(run);
  const YamlNode root = parse_yaml(yaml, where, problems);
  schema.read(root, problems);
  for (const std::string& assignment : overrides) schema.apply_override(assignment, problems);
  const bool parsed = root.kind == YamlNode::Kind::kMap;  // else the missing keys would be noise
  if (parsed) schema.check_required(where, problems);
  if (problems.empty()) check_together(run, schema, problems);
  problems.throw_if_any(ExitCode::kUsage, where);
  run.notes = schema.notes();
  for (std::string& note : without_effect(run)) run.notes.push_back(std::move(note));
  return run;
}

bool RunConfig::Router::has_term(AuxKind term) const {
  for (std::size_t i = 0; i < aux_kind.size() && i < aux_loss.size(); ++i)
    if (aux_kind[i] == term && aux_loss[i] > 0) return true;
  return false;
}

bool masks_targets(const RunConfig::Data& data) {
  return std::any_of(data.train.begin(), data.train.end(), [](const DataSource& s) { return s.loss_mask; });
}

RunConfig read_run_config(const std::filesystem::path& file, const std::vector<std::string>& overrides) {
  return parse_run_config(read_text_file(file), file.string(), overrides);
}

std::string to_yaml(const RunConfig& run) {
  RunConfig copy = run;  // a schema binds to a struct it could also write
  return run_schema(copy).to_yaml();
}

std::string run_config_reference() {
  RunConfig defaults;
  return run_schema(defaults).reference();
}

std::string run_config_help() {
  RunConfig defaults;
  return run_schema(defaults).help();
}

}  // namespace upmoe
