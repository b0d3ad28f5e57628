#include "configs/run_config.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>

#include "configs/schema.h"
#include "configs/schema_values.h"
#include "kernels/core/tensor.h"

namespace upmoe {
namespace {

constexpr double kMaxSteps = 1e9, kMaxSequences = 1e9, kMaxSeqLen = 1 << 24;

void read_source(const YamlNode& node, const std::string& key, std::vector<DataSource>& out,
                 Problems& problems) {
  if (node.kind != YamlNode::Kind::kMap) {
    if (auto path = text_of(node, key, {}, problems)) out.push_back({*std::move(path), 1.0});
    return;
  }
  DataSource source;
  for (const auto& [name, value] : node.entries) {
    if (name.text == "path") {
      if (auto path = text_of(value, key + ".path", {}, problems)) source.path = *std::move(path);
    } else if (name.text == "weight") {
      const NumberCheck positive{.least = 0, .above = true};
      if (const auto weight = number_of(value, key + ".weight", positive, problems)) source.weight = *weight;
    } else {
      problems.add(name.where, fmt::format("unknown key '{}.{}'; valid here: path, weight", key, name.text));
    }
  }
  const bool has_path = std::any_of(node.entries.begin(), node.entries.end(),
                                    [](const auto& entry) { return entry.first.text == "path"; });
  if (!has_path) problems.add(node.where, key + ": path is missing");
  out.push_back(std::move(source));
}

// A path, or a list of paths and {path, weight} maps.
void read_sources(const YamlNode& node, const std::string& key, std::vector<DataSource>& out,
                  Problems& problems) {
  std::vector<DataSource> sources;
  if (node.kind == YamlNode::Kind::kList) {
    if (node.items.empty()) problems.add(node.where, key + ": the list is empty");
    for (std::size_t i = 0; i < node.items.size(); ++i) {
      read_source(node.items[i], fmt::format("{}[{}]", key, i), sources, problems);
    }
  } else {
    read_source(node, key, sources, problems);
  }
  out = std::move(sources);
}

std::string write_sources(const std::vector<DataSource>& sources) {
  std::vector<std::string> items;
  for (const DataSource& s : sources) {
    items.push_back(fmt::format("{{path: {}, weight: {}}}", yaml_quoted(s.path), s.weight));
  }
  return fmt::format("[{}]", fmt::join(items, ", "));
}

void add_data(Schema& schema, RunConfig::Data& data) {
  schema.section("data")
      .key(
          "train", "path | list of {path, weight}", true,
          [&data](const YamlNode& node, const std::string& key, Problems& problems) {
            read_sources(node, key, data.train, problems);
          },
          [&data] { return write_sources(data.train); })
      .key("valid", data.valid, {.may_be_empty = true})
      .key("seq_len", data.seq_len, {.least = 1, .most = kMaxSeqLen, .required = true})
      .key("shuffle", data.shuffle)
      .key("mask_documents", data.mask_documents)
      .key("seed", data.seed, {.least = 0});
}

void add_training(Schema& schema, RunConfig& run) {
  schema.section("train")
      .key("steps", run.train.steps, {.least = 1, .most = kMaxSteps, .required = true})
      .key("global_batch", run.train.global_batch, {.least = 1, .most = kMaxSequences, .required = true})
      .key("micro_batch", run.train.micro_batch, {.least = 1, .most = kMaxSequences, .required = true})
      .key("precision", run.train.precision, {.names = {"fp32", "bf16"}})
      .key("recompute", run.train.recompute, {.names = {"none", "swiglu", "routed_up", "up", "ffn", "block"}})
      .key("deterministic", run.train.deterministic)
      .key("eval_every", run.train.eval_every, {.least = 0})
      .key("eval_sequences", run.train.eval_sequences, {.least = 0})
      .key("nonfinite_patience", run.train.nonfinite_patience, {.least = 1});
  schema.section("optimizer")
      .key("name", run.optimizer.name, {.names = {"adamw", "adamw8bit"}})
      .key("lr", run.optimizer.lr, {.least = 0})
      .key("beta1", run.optimizer.beta1, {.least = 0, .most = 1, .below = true})
      .key("beta2", run.optimizer.beta2, {.least = 0, .most = 1, .below = true})
      .key("eps", run.optimizer.eps, {.least = 0, .above = true})
      .key("weight_decay", run.optimizer.weight_decay, {.least = 0})
      .key("clip", run.optimizer.clip, {.least = 0})
      .key("offload", run.optimizer.offload);
  schema.section("schedule")
      .key("name", run.schedule.name, {.names = {"cosine", "wsd", "constant"}})
      .key("warmup", run.schedule.warmup, {.least = 0})
      .key("min_lr_ratio", run.schedule.min_lr_ratio, {.least = 0, .most = 1})
      .key("decay_fraction", run.schedule.decay_fraction, {.least = 0, .most = 1, .above = true});
}

Schema schema_of(RunConfig& run) {
  Schema schema;
  schema.section("run").key("dir", run.run.dir, {.required = true}).key("seed", run.run.seed, {.least = 0});
  schema.section("model")
      .key("path", run.model.path, {.required = true})
      .key("init", run.model.init, {.names = {"weights", "random"}});
  schema.section("router")
      .key("aux_loss", run.router.aux_loss, {.least = 0})
      .key("aux_kind", run.router.aux_kind,
           {.names = {"hf", "switch"}, .planned = {"gshard", "sequence", "global"}})
      .key("z_loss", run.router.z_loss, {.least = 0})
      .key("bias_rate", run.router.bias_rate, {.least = 0, .built = {0}})
      .key("capacity_factor", run.router.capacity_factor, {.least = 0, .built = {0}});
  add_data(schema, run.data);
  add_training(schema, run);
  schema.section("parallel")
      .key("tp", run.parallel.tp, {.least = 1})
      .key("pp", run.parallel.pp, {.least = 1})
      .key("cp", run.parallel.cp, {.least = 1})
      .key("ep", run.parallel.ep, {.least = 1})
      .key("etp", run.parallel.etp, {.least = 1})
      .key("zero", run.parallel.zero, {.least = 0, .most = 3, .built = {1, 2}})
      .key("reduce", run.parallel.reduce, {.names = {"fp32", "bf16"}})
      .key("pp_chunks", run.parallel.pp_chunks, {.least = 1})
      .key("node_ranks", run.parallel.node_ranks, {.least = 0});
  schema.section("").key("freeze", run.freeze);
  schema.section("checkpoint")
      .key("every", run.checkpoint.every, {.least = 0})
      .key("keep", run.checkpoint.keep, {.least = 2})
      .key("async", run.checkpoint.async);
  schema.section("log").key("every", run.log.every, {.least = 1}).key("tensorboard", run.log.tensorboard);
  schema.section("").key("device", run.device, {.names = {"auto", "cpu", "cuda"}});
  return schema;
}

// Rules between keys that need neither the model nor the number of ranks.
void check_together(const RunConfig& run, const Schema& schema, Problems& problems) {
  const auto& t = run.train;
  if (run.schedule.warmup > t.steps) {
    problems.add(schema.place_of("schedule.warmup"),
                 fmt::format("found {}, but train.steps is {}; the warm-up must fit into the run",
                             run.schedule.warmup, t.steps));
  }
  if (t.global_batch % t.micro_batch != 0) {
    problems.add(schema.place_of("train.micro_batch"),
                 fmt::format("{} does not divide train.global_batch = {}", t.micro_batch, t.global_batch));
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
  Schema schema = schema_of(run);
  const YamlNode root = parse_yaml(yaml, where, problems);
  schema.read(root, problems);
  for (const std::string& assignment : overrides) schema.apply_override(assignment, problems);
  const bool parsed = root.kind == YamlNode::Kind::kMap;  // else the missing keys would be noise
  if (parsed) schema.check_required(where, problems);
  if (problems.empty()) check_together(run, schema, problems);
  problems.throw_if_any(ExitCode::kUsage, where);
  return run;
}

RunConfig read_run_config(const std::filesystem::path& file, const std::vector<std::string>& overrides) {
  return parse_run_config(read_text_file(file), file.string(), overrides);
}

std::string to_yaml(const RunConfig& run) {
  RunConfig copy = run;  // a schema binds to a struct it could also write
  return schema_of(copy).to_yaml();
}

std::string run_config_reference() {
  RunConfig defaults;
  return schema_of(defaults).reference();
}

}  // namespace upmoe
