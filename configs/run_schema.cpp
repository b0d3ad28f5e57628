#include "configs/run_schema.h"

#include <fmt/format.h>

#include <algorithm>
#include <cctype>

#include "configs/lora_record.h"
#include "configs/path_text.h"
#include "configs/schema_values.h"
#include "configs/teacher_record.h"
#include "kernels/core/expert_groups.h"

namespace upmoe {
namespace {

constexpr double kMaxSteps = 1e9, kMaxSequences = 1e9, kMaxSeqLen = 1 << 24;

const TextCheck kPath{.path = true};

void read_source(const YamlNode& node, const std::string& key, std::vector<DataSource>& out,
                 Problems& problems) {
  if (node.kind != YamlNode::Kind::kMap) {
    if (auto path = text_of(node, key, kPath, problems)) out.push_back({*std::move(path), 1.0});
    return;
  }
  DataSource source;
  for (const auto& [name, value] : node.entries) {
    if (name.text == "path") {
      if (auto path = text_of(value, key + ".path", kPath, problems)) source.path = *std::move(path);
    } else if (name.text == "weight") {
      const NumberCheck positive{.least = 0, .above = true};
      if (const auto weight = number_of(value, key + ".weight", positive, problems)) source.weight = *weight;
    } else if (name.text == "loss_mask") {
      if (const auto mask = truth_of(value, key + ".loss_mask", problems)) source.loss_mask = *mask;
    } else {
      problems.add(name.where,
                   fmt::format("unknown key '{}.{}'; valid here: path, weight, loss_mask", key, name.text));
    }
  }
  const bool has_path = std::any_of(node.entries.begin(), node.entries.end(),
                                    [](const auto& entry) { return entry.first.text == "path"; });
  if (!has_path) problems.add(node.where, key + ": path is missing");
  out.push_back(std::move(source));
}

// A path, or a list of paths and {path, weight, loss_mask} maps.
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
    items.push_back(fmt::format("{{path: {}, weight: {}{}}}", yaml_quoted(path_as_text(s.path)), s.weight,
                                s.loss_mask ? ", loss_mask: true" : ""));
  }
  return fmt::format("[{}]", fmt::join(items, ", "));
}

// A path, nothing, or a map of names to paths.
void read_sets(const YamlNode& node, const std::string& key, std::vector<HeldOutSet>& out,
               Problems& problems) {
  out.clear();
  if (node.kind == YamlNode::Kind::kScalar) {
    const auto path = text_of(node, key, {.may_be_empty = true, .path = true}, problems);
    if (path && !path->empty()) out.push_back({"", *path});
    return;
  }
  if (node.kind != YamlNode::Kind::kMap || node.entries.empty()) {
    problems.add(node.where,
                 key + ": expected a path, or names with their paths such as {code: c.h5, prose: p.h5}");
    return;
  }
  for (const auto& [name, value] : node.entries) {
    const bool plain =
        !name.text.empty() && std::all_of(name.text.begin(), name.text.end(), [](unsigned char c) {
          return std::isalnum(c) != 0 || c == '_' || c == '-' || c == '.';
        });
    if (!plain)
      problems.add(
          name.where,
          fmt::format("{}: '{}' is no name of a set; use letters, digits, '_', '-' and '.'", key, name.text));
    if (auto path = text_of(value, key + "." + name.text, kPath, problems))
      out.push_back({name.text, *std::move(path)});
  }
}

std::string write_sets(const std::vector<HeldOutSet>& sets) {
  if (sets.empty()) return yaml_quoted("");
  if (sets.front().name.empty()) return yaml_quoted(path_as_text(sets.front().path));
  std::vector<std::string> items;
  for (const HeldOutSet& set : sets)
    items.push_back(fmt::format("{}: {}", yaml_quoted(set.name), yaml_quoted(path_as_text(set.path))));
  return fmt::format("{{{}}}", fmt::join(items, ", "));
}

// One pattern, or a list of them.
std::vector<std::string> read_patterns(const YamlNode& node, const std::string& key, Problems& problems) {
  std::vector<std::string> patterns;
  const bool list = node.kind == YamlNode::Kind::kList;
  if (list && node.items.empty()) problems.add(node.where, key + ": the list is empty");
  for (const YamlNode& item : list ? node.items : std::vector{node})
    if (auto pattern = text_of(item, key, {}, problems)) patterns.push_back(*std::move(pattern));
  return patterns;
}

OptimizerGroup read_group(const YamlNode& node, const std::string& key, Problems& problems) {
  OptimizerGroup group;
  if (node.kind != YamlNode::Kind::kMap) {
    problems.add(node.where, key + ": expected a map such as {match: '@router', lr: 1.0e-5}");
    return group;
  }
  bool matches = false;
  for (const auto& [name, value] : node.entries) {
    const std::string full = key + "." + name.text;
    if (name.text == "match") {
      group.match = read_patterns(value, full, problems);
      matches = true;
    } else if (name.text == "lr") {
      group.lr = number_of(value, full, {.least = 0}, problems);
    } else if (name.text == "weight_decay") {
      group.weight_decay = number_of(value, full, {.least = 0}, problems);
    } else {
      problems.add(name.where, fmt::format("unknown key '{}'; valid here: match, lr, weight_decay", full));
    }
  }
  if (!matches) problems.add(node.where, key + ": match is missing");
  return group;
}

void read_groups(const YamlNode& node, const std::string& key, std::vector<OptimizerGroup>& out,
                 Problems& problems) {
  if (node.kind != YamlNode::Kind::kList) {
    problems.add(node.where, key + ": expected a list, such as [{match: '@router', lr: 1.0e-5}]");
    return;
  }
  out.clear();
  for (std::size_t i = 0; i < node.items.size(); ++i)
    out.push_back(read_group(node.items[i], fmt::format("{}[{}]", key, i), problems));
}

std::string write_groups(const std::vector<OptimizerGroup>& groups) {
  std::vector<std::string> items;
  for (const OptimizerGroup& g : groups) {
    std::vector<std::string> patterns;
    for (const std::string& pattern : g.match) patterns.push_back(yaml_quoted(pattern));
    std::string item = fmt::format("{{match: [{}]", fmt::join(patterns, ", "));
    if (g.lr) item += fmt::format(", lr: {}", *g.lr);
    if (g.weight_decay) item += fmt::format(", weight_decay: {}", *g.weight_decay);
    items.push_back(item + "}");
  }
  return fmt::format("[{}]", fmt::join(items, ", "));
}

void add_data(Schema& schema, RunConfig::Data& data) {
  schema.section("data")
      .key(
          "train", "path | list of {path, weight, loss_mask}", true,
          [&data](const YamlNode& node, const std::string& key, Problems& problems) {
            read_sources(node, key, data.train, problems);
          },
          [&data] { return write_sources(data.train); })
      .says(
          "Token files to train on, in HDF5 or PREFIX.bin of Megatron-LM; each gives its weight's share "
          "of the sequences. loss_mask: true: only targets that the file's mask counts.")
      .key(
          "valid", "path or nothing | map of names to paths", false,
          [&data](const YamlNode& node, const std::string& key, Problems& problems) {
            read_sets(node, key, data.valid, problems);
          },
          [&data] { return write_sets(data.valid); })
      .says(
          "Held-out token file, or several by name, each with a loss of its own; without any nothing is "
          "evaluated.")
      .key("valid_loss_mask", data.valid_loss_mask)
      .says("Held-out targets count where the file's mask says so.")
      .key("seq_len", data.seq_len, {.least = 1, .most = kMaxSeqLen, .required = true})
      .says("Tokens per sequence.")
      .key("shuffle", data.shuffle)
      .says("Each epoch in an order of its own; false: as the files stand.")
      .key("mask_documents", data.mask_documents)
      .says("Attention and positions restart at each document of a sequence.")
      .key("seed", data.seed, {.least = 0})
      .says("Of the order of the sequences.");
}

void add_train(Schema& schema, RunConfig::Train& train) {
  schema.section("train")
      .key("steps", train.steps, {.least = 1, .most = kMaxSteps, .required = true})
      .says("Optimizer steps of the whole run, those of earlier starts included.")
      .key("global_batch", train.global_batch, {.least = 1, .most = kMaxSequences, .required = true})
      .says("Sequences per step, over all ranks.")
      .key("micro_batch", train.micro_batch, {.least = 1, .most = kMaxSequences, .required = true})
      .says("Sequences that a data-parallel rank computes at once; less takes less memory.")
      .key("precision", train.precision)
      .says("bf16: weights and activations in bf16 beside fp32 masters and moments.")
      .key("recompute", train.recompute)
      .says("What backward computes again instead of keeping: less memory, more work.")
      .key("deterministic", train.deterministic)
      .says("Two runs of one layout have the same bits. false: faster attention backward on GPUs.")
      .key("eval_every", train.eval_every, {.least = 0})
      .says("Steps between held-out evaluations; 0: before the first step and after the last.")
      .key("eval_sequences", train.eval_sequences, {.least = 0})
      .says("Sequences of each set of data.valid per evaluation; 0: all.")
      .key("nonfinite_patience", train.nonfinite_patience, {.least = 1})
      .says("Non-finite steps in a row, each skipped, before the run stops with status 4.");
}

void add_optimization(Schema& schema, RunConfig& run) {
  schema.section("optimizer")
      .key("name", run.optimizer.name)
      .says("adamw8bit: moments in 8 bits and no masters.")
      .key("lr", run.optimizer.lr, {.least = 0})
      .says("Learning rate at the schedule's peak.")
      .key("beta1", run.optimizer.beta1, {.least = 0, .most = 1, .below = true})
      .says("Decay of the first moment.")
      .key("beta2", run.optimizer.beta2, {.least = 0, .most = 1, .below = true})
      .says("Decay of the second moment.")
      .key("eps", run.optimizer.eps, {.least = 0, .above = true})
      .says("Added to the root of the second moment.")
      .key("weight_decay", run.optimizer.weight_decay, {.least = 0})
      .says("Decoupled; of matrices, not of norms and biases.")
      .key("clip", run.optimizer.clip, {.least = 0})
      .says("Largest global norm of the gradient; 0: no clipping.")
      .key("offload", run.optimizer.offload)
      .says("On GPUs: masters and moments in the host's memory.")
      .key(
          "groups", "list of {match, lr, weight_decay}", false,
          [&groups = run.optimizer.groups](const YamlNode& node, const std::string& key, Problems& problems) {
            read_groups(node, key, groups, problems);
          },
          [&groups = run.optimizer.groups] { return write_groups(groups); })
      .says(
          "Parameters with a rate or decay of their own; match: patterns as of freeze. The first group that "
          "catches a parameter counts. The schedule is that of optimizer.lr.");
  schema.section("schedule")
      .key("name", run.schedule.name)
      .says("Of the learning rate after the warm-up; wsd: constant, then a linear decay.")
      .key("warmup", run.schedule.warmup, {.least = 0})
      .says("Steps of linear rise to optimizer.lr.")
      .key("min_lr_ratio", run.schedule.min_lr_ratio, {.least = 0, .most = 1})
      .says("Of optimizer.lr, at the last step (cosine, wsd).")
      .key("decay_fraction", run.schedule.decay_fraction, {.least = 0, .most = 1, .above = true})
      .says("wsd: share of the steps, at the end, that the decay takes; it begins after the warm-up.");
}

// What a router does in training alone.
void add_router_training(Schema& schema, RunConfig::Router& router) {
  schema.key("kind", router.kind)
      .says(
          "noisy: topk by logits with learnt noise; switch: topk with one expert, weighed by its "
          "probability; gshard: with two, in training the "
          "second one with a probability of twice its weight; expert_choice: every expert takes its best "
          "tokens of a group; mixture_of_tokens: every expert computes one mixture of a group.")
      .key("jitter", router.jitter, {.least = 0, .most = 1, .below = true})
      .says("In training the router's input is multiplied by factors from 1 - jitter to 1 + jitter.")
      .key("capacity_factor", router.capacity_factor, {.least = 0})
      .says(
          "In training an expert takes at most this times its equal share, and the rest is dropped. 0: no "
          "token is dropped. Of kind expert_choice: experts of a token on the mean; 0: num_experts_per_tok.")
      .key("capacity_pool", router.capacity_pool)
      .says("The tokens whose equal share it is: those of a sequence, or of a micro-batch.")
      .key("drop", router.drop)
      .says("Dropped are second choices before first ones and the last tokens first, or the least weights.")
      .key("group_size", router.group_size, {.least = 2})
      .says(
          "Of kinds expert_choice and mixture_of_tokens: sequences whose tokens at one position are a group; "
          "a divisor of train.micro_batch.")
      .key("temperature", router.temperature, {.least = kLeastTemperature})
      .says("Of kind mixture_of_tokens: what the logits are divided by.");
}

void add_router(Schema& schema, RunConfig::Router& router) {
  schema.section("router")
      .key("aux_loss", router.aux_loss, {.least = 0})
      .says("Coefficient of the load-balancing loss; a list: of each of router.aux_kind.")
      .key("aux_kind", router.aux_kind)
      .says(
          "hf: over all layers at once, as in transformers; switch, gshard: layer by layer, of first "
          "choices; sequence: sequence by sequence; group: over groups of experts; global: loads of the step "
          "before; importance, load: variation of the experts' weights and, with kind noisy, chances. A "
          "list: all of them.")
      .key("aux_groups", router.aux_groups, {.least = 1})
      .says("Groups of neighbouring experts that aux_kind group balances, such as those of a device.")
      .key("z_loss", router.z_loss, {.least = 0})
      .says("Coefficient of the router's z-loss.")
      .key("score", router.score)
      .says("Of an expert for a token; auto: as model.path has it, which is softmax unless it says so.")
      .key("scale", router.scale, {.least = 0, .above = true})
      .says("Factor on the weights of the chosen experts; with score: sigmoid.")
      .key("groups", router.groups, {.least = 1, .most = kMostExpertGroups})
      .says("Experts lie in as many groups, of which the best may be chosen from; with score: sigmoid.")
      .key("group_topk", router.group_topk, {.least = 1, .most = kMostExpertGroups})
      .says("Groups that a token may choose from: those with the best sum of two scores.")
      .key("bias_rate", router.bias_rate, {.least = 0})
      .says("Step of the experts' biases, which balance without a loss; with score: sigmoid. 0: they stay.")
      .key("dtype", router.dtype)
      .says("fp32: weight, gradient and product of the routers in fp32 beside bf16; auto: as the others.");
  add_router_training(schema, router);
}

void add_layout(Schema& schema, RunConfig::Parallel& parallel) {
  schema.section("parallel")
      .key("tp", parallel.tp, {.least = 1})
      .says("Tensor-parallel ranks; what is left of all ranks is data-parallel.")
      .key("pp", parallel.pp, {.least = 1})
      .says("Pipeline stages.")
      .key("cp", parallel.cp, {.least = 1})
      .says("Context-parallel ranks: each has a part of every sequence.")
      .key("ep", parallel.ep, {.least = 1})
      .says("Ranks that the experts are divided over.")
      .key("etp", parallel.etp, {.least = 1})
      .says("Ranks that each expert's width is divided over.")
      .key("zero", parallel.zero, {.least = 0, .most = 3, .built = {1, 2}})
      .says("1: optimizer state divided over the ranks. 2: blocks share their gradients' memory as well.")
      .key("reduce", parallel.reduce)
      .says("In what gradients are added up, over micro-batches and ranks.")
      .key("pp_chunks", parallel.pp_chunks, {.least = 1})
      .says("Runs of blocks per pipeline stage; above 1 the schedule is interleaved.")
      .key("node_ranks", parallel.node_ranks, {.least = 0})
      .says("Ranks per node: expert rows cross to another node once. 0: straight to their rank.");
}

void add_lora(Schema& schema, RunConfig::Lora& lora) {
  schema.section("lora")
      .key("rank", lora.rank, {.least = 0, .most = kMostLoraRank})
      .says("Of low-rank adapters, which then train alone; 0: none. docs/finetune.md.")
      .key("alpha", lora.alpha, {.least = 0, .above = true})
      .says("An adapter's product counts alpha / rank times.")
      .key("targets", lora.targets)
      .says("Modules that get adapters; gate_proj, up_proj and down_proj: of dense networks and all experts.")
      .key("dropout", lora.dropout, {.least = 0, .most = 1, .below = true, .built = {0}})
      .says("Share of what an adapter reads that training leaves out.");
}

}  // namespace

Schema run_schema(RunConfig& run) {
  Schema schema;
  schema.section("run")
      .key("dir", run.run.dir, {.required = true, .path = true})
      .says("Folder of the run; when checkpoints lie there, the run goes on from the newest.")
      .key("seed", run.run.seed, {.least = 0})
      .says("Of random weights (model.init random), of adamw8bit's rounding and of what routers draw.");
  schema.section("model")
      .key("path", run.model.path, {.required = true, .path = true})
      .says("Hugging Face directory, checkpoint or run directory to start from.")
      .key("init", run.model.init)
      .says("random: of model.path only config.json counts.");
  add_router(schema, run.router);
  add_data(schema, run.data);
  add_train(schema, run.train);
  add_teacher(schema, run.train.teacher);
  add_optimization(schema, run);
  add_layout(schema, run.parallel);
  schema.section("kernels")
      .key("experts", run.kernels.experts)
      .says(
          "On GPUs: fused, Hopper's kernels for all experts at once, in bf16; streams, a product for each; "
          "auto: streams.")
      .key("cross_entropy", run.kernels.cross_entropy)
      .says("On GPUs: clusters, of Hopper's blocks that keep a row; portable, any GPU's; auto: portable.");
  schema.section("")
      .key("freeze", run.freeze)
      .says(
          "Patterns of parameters that do not train, in our names or Hugging Face's, or presets: @experts, "
          "@router, @attention, @shared, and @non_experts and so on for all the rest; quote them: "
          "['*mlp.gate.weight'].");
  add_lora(schema, run.lora);
  schema.section("checkpoint")
      .key("every", run.checkpoint.every, {.least = 0})
      .says("Steps between checkpoints; 0: at the end alone.")
      .key("keep", run.checkpoint.keep, {.least = 2})
      .says("Newest checkpoints that stay; the disk needs room for one more.")
      .key("keep_every", run.checkpoint.keep_every, {.least = 0})
      .says("Beside those, the checkpoints of its multiples stay for good; a multiple of every; 0: none.")
      .key("async", run.checkpoint.async)
      .says("Write while training goes on.");
  schema.section("log")
      .key("every", run.log.every, {.least = 1})
      .says("Steps between lines of metrics.jsonl.")
      .key("tensorboard", run.log.tensorboard)
      .says("Write TensorBoard events as well.");
  schema.section("").key("device", run.device).says("auto: GPUs where every rank has one.");
  return schema;
}

}  // namespace upmoe
