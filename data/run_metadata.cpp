#include "data/run_metadata.h"

#include <nlohmann/json.hpp>

#include "data/shard_store.h"

namespace upmoe {

using nlohmann::json;

namespace {

struct RunObject {
  const json& run;
  const std::string& where;

  const json& at(const char* key) const {
    const auto found = run.find(key);
    if (found == run.end()) fail(ExitCode::kBadInput, "{}: run.{} is missing", where, key);
    return *found;
  }
  [[noreturn]] void refuse(const char* key, const json& value, const char* expected) const {
    fail(ExitCode::kBadInput, "{}: run.{} is {}, expected {}", where, key,
         value.is_number() ? value.dump() : fmt::format("of type {}", value.type_name()), expected);
  }
  std::int64_t count(const char* key) const {
    const json& value = at(key);
    if (!value.is_number_unsigned() || value.get<std::uint64_t>() > std::uint64_t{1} << 62)
      refuse(key, value, "a count");
    return value.get<std::int64_t>();
  }
  std::string text(const char* key) const {
    const json& value = at(key);
    if (!value.is_string()) refuse(key, value, "a string");
    return value.get<std::string>();
  }
  std::map<std::string, std::int64_t> counts_by_name(const char* key) const {
    std::map<std::string, std::int64_t> counts;
    if (!run.contains(key)) return counts;
    if (!run[key].is_object()) refuse(key, run[key], "counts by name");
    for (const auto& [name, value] : run[key].items()) {
      if (!value.is_number_unsigned() || value.get<std::uint64_t>() > std::uint64_t{1} << 62)
        refuse(key, value, "counts by name");
      counts[name] = value.get<std::int64_t>();
    }
    return counts;
  }
  std::optional<std::string> text_if_any(const char* key) const {
    return run.contains(key) ? std::optional(text(key)) : std::nullopt;
  }
};

}  // namespace

std::string run_metadata_json(const RunMetadata& r) {
  json run{{"step", r.step},     {"samples", r.samples},
           {"tokens", r.tokens}, {"model_config", r.model_config},
           {"source", r.source}, {"data_fingerprint", r.data_fingerprint}};
  if (r.config) run["config"] = *r.config;
  if (r.mesh) run["mesh"] = *r.mesh;
  if (r.source_digest) run["source_digest"] = *r.source_digest;
  if (r.teacher_digest) run["teacher_digest"] = *r.teacher_digest;
  if (!r.moments_begun.empty()) run["moments_begun"] = r.moments_begun;
  return run.dump();
}

RunMetadata parse_run_metadata(const std::string& text, const std::string& where) {
  const json j = json::parse(text, nullptr, false);
  if (!j.is_object()) fail(ExitCode::kBadInput, "{}: 'run' is not an object", where);
  const RunObject run{j, where};
  return {.step = run.count("step"),
          .samples = run.count("samples"),
          .tokens = run.count("tokens"),
          .model_config = run.text("model_config"),
          .source = run.text("source"),
          .data_fingerprint = run.text("data_fingerprint"),
          .config = run.text_if_any("config"),
          .mesh = run.text_if_any("mesh"),
          .source_digest = run.text_if_any("source_digest"),
          .teacher_digest = run.text_if_any("teacher_digest"),
          .moments_begun = run.counts_by_name("moments_begun")};
}

RunMetadata run_metadata_of(const ShardStore& store) {
  return parse_run_metadata(store.metadata_json(), (store.dir() / "manifest.json").string());
}

}  // namespace upmoe
