#include "trainer/run_summary.h"

#include <fmt/format.h>

#include <algorithm>
#include <fstream>
#include <functional>
#include <numeric>
#include <utility>

#include "configs/expert_use.h"
#include "configs/lora_record.h"
#include "configs/run_notes.h"
#include "data/repeated_files.h"
#include "data/staged_directory.h"
#include "kernels/core/log.h"

namespace upmoe {

namespace fs = std::filesystem;

namespace {

constexpr double kManyEpochs = 4;  // beyond, repeated tokens are worth less and less

std::string grouped(std::int64_t n) {  // 1,234,567
  const std::string digits = std::to_string(n);
  std::string out;
  for (std::size_t i = 0; i < digits.size(); ++i) {
    if (i > 0 && (digits.size() - i) % 3 == 0) out += ',';
    out += digits[i];
  }
  return out;
}

// The name without its layer, so that the same parameter of all layers is one entry.
std::string group_of(const ParamSpec& p) {
  return p.layer == kOutsideBlocks ? p.name : fmt::format("layers.*.{}", name_of(p.role));
}

using Choose = std::function<bool(const StoredParam& p)>;

struct Count {
  std::int64_t tensors = 0, values = 0;
};
Count count_of(const ParamStore& params, const Choose& choose) {
  Count count;
  for (const StoredParam& p : params.all()) {
    if (!choose(p)) continue;
    ++count.tensors;
    count.values += p.spec.shape.elements();
  }
  return count;
}

// "layers.*.moe.router_ED x 2, norm_D", in the order of the table.
std::string list_of(const ParamStore& params, const Choose& choose) {
  std::vector<std::pair<std::string, int>> groups;
  for (const StoredParam& p : params.all()) {
    if (!choose(p)) continue;
    const std::string name = group_of(p.spec);
    const auto it =
        std::find_if(groups.begin(), groups.end(), [&](const auto& group) { return group.first == name; });
    if (it == groups.end()) {
      groups.emplace_back(name, 1);
    } else {
      ++it->second;
    }
  }
  std::string words;
  for (const auto& [name, count] : groups)
    words +=
        fmt::format("{}{}{}", words.empty() ? "" : ", ", name, count > 1 ? fmt::format(" x {}", count) : "");
  return words;
}

double share_of(const RunConfig& run, std::size_t source) {
  double sum = 0;
  for (const DataSource& s : run.data.train) sum += s.weight;
  return run.data.train[source].weight / sum;
}

void log_model(const Session& s, const TrainState& state) {
  const ModelConfig& c = s.config;
  const ParamCounts counts = count_params(c);
  const std::string experts = c.num_moe_layers() > 0 ? fmt::format(", {} experts of which {} compute a token",
                                                                   c.num_experts, expert_use(c).per_token())
                                                     : "";
  log::info("model: {} ({}), {}: {} layers{}; {} parameters, {} activated per token", state.source,
            start_of(s.run, state), c.model_type, c.num_hidden_layers, experts, grouped(counts.total),
            grouped(counts.activated));
  if (c.lora.given())
    log::info("adapters: {}; their {} values train alone", words_of(c.lora),
              grouped(count_of(s.params, [](const StoredParam& p) { return p.trains(); }).values));
  if (const std::string frozen = describe_frozen(s.params); !frozen.empty()) log::info("frozen: {}", frozen);
  if (const std::string kept = describe_fp32(s.params); !kept.empty()) log::info("kept in fp32: {}", kept);
  if (const std::string buffers = describe_buffers(s.params); !buffers.empty())
    log::info("buffers, {} values that no optimizer touches: {}", grouped(counts.buffers), buffers);
}

void log_teacher(const Session& s) {
  if (s.teacher == nullptr) return;
  const RunConfig::Train::Teacher& t = s.run.train.teacher;
  const ModelConfig& c = s.teacher->config();
  log::info(
      "teacher: {}, {}: {} layers; {} parameters; of the loss {:.4g} is its divergence at temperature {}",
      t.model, c.model_type, c.num_hidden_layers, grouped(count_params(c).total), t.weight, t.temperature);
}

void log_data(const Session& s, const TrainState& state, std::span<const HeldOutData> valid) {
  const std::vector<std::int64_t> sequences = s.data->sequences_of_source();
  log::info("data: {}", describe_data(s.run, sequences, state.step + 1));
  for (const std::string& line : repeated_data(s.run, sequences)) log::warning("data: {}", line);
  std::vector<const TokenFile*> held_out;
  for (const HeldOutData& set : valid) held_out.push_back(set.data->files().front());
  for (const std::string& line : repeated_files(s.data->files(), held_out)) log::warning("data: {}", line);
  for (std::size_t i = 0; i < s.run.data.train.size(); ++i)
    if (s.data->files()[i]->has_loss_mask() && !s.run.data.train[i].loss_mask)
      log::warning("data: {} has a loss mask, but every target counts: data.train[{}].loss_mask is false",
                   s.run.data.train[i].path, i);
  // Held-out targets that training leaves out would make a loss of another kind than that of the steps.
  for (const TokenFile* file : held_out)
    if (file->has_loss_mask() && s.data->masks_targets() && !s.run.data.valid_loss_mask)
      log::warning(
          "data: {} has a loss mask, but every held-out target counts: data.valid_loss_mask is false",
          file->path().string());
  for (std::size_t i = 0; i < valid.size(); ++i) {
    const std::int64_t all = valid[i].data->num_sequences(), wanted = s.run.train.eval_sequences;
    const std::string name = valid[i].name.empty() ? "" : " (" + valid[i].name + ")";
    log::info("held out{}: {} of the {} sequences of {}, {}", name, wanted == 0 ? all : std::min(all, wanted),
              all, s.run.data.valid[i].path,
              s.run.train.eval_every > 0 ? fmt::format("every {} steps", s.run.train.eval_every)
                                         : "before the first step and after the last");
  }
}

}  // namespace

std::string start_of(const RunConfig& run, const TrainState& state) {
  if (state.step > 0) return fmt::format("going on after step {}", state.step);
  return run.model.init == ModelInit::kRandom ? fmt::format("random weights of seed {}", run.run.seed)
                                              : "its weights";
}

std::string describe_frozen(const ParamStore& params) {
  const auto trained = [](const StoredParam& p) { return p.spec.trained; };
  const auto frozen = [](const StoredParam& p) { return p.frozen; };
  const Count some = count_of(params, frozen), all = count_of(params, trained);
  if (some.tensors == 0) return "";
  return fmt::format("{} of {} parameters ({} of {} values): {}", some.tensors, all.tensors,
                     grouped(some.values), grouped(all.values), list_of(params, frozen));
}

std::string describe_fp32(const ParamStore& params) {
  if (params.compute_dtype() == DType::kF32) return "";
  return list_of(params, [](const StoredParam& p) { return p.spec.trained && p.spec.fp32; });
}

std::string describe_buffers(const ParamStore& params) {
  return list_of(params, [](const StoredParam& p) { return !p.spec.trained; });
}

std::string describe_data(const RunConfig& run, const std::vector<std::int64_t>& sequences_of_source,
                          std::int64_t first_step) {
  const std::int64_t sequences =
      std::accumulate(sequences_of_source.begin(), sequences_of_source.end(), std::int64_t{0});
  const std::int64_t taken = (run.train.steps - first_step + 1) * run.train.global_batch;
  std::string words =
      fmt::format("{} sequences of {} tokens in {} file{}; steps {} to {} take {}", grouped(sequences),
                  run.data.seq_len, sequences_of_source.size(), sequences_of_source.size() == 1 ? "" : "s",
                  first_step, run.train.steps, grouped(taken));
  for (std::size_t i = 0; i < sequences_of_source.size(); ++i) {
    const double epochs =
        static_cast<double>(taken) * share_of(run, i) / static_cast<double>(sequences_of_source[i]);
    words +=
        fmt::format("{} {:.3g} epochs{}", i == 0 ? "," : " and", epochs,
                    sequences_of_source.size() == 1 ? "" : fmt::format(" of {}", run.data.train[i].path));
  }
  return words + fmt::format("; {} tokens per step", grouped(run.tokens_per_step()));
}

std::vector<std::string> repeated_data(const RunConfig& run,
                                       const std::vector<std::int64_t>& sequences_of_source) {
  std::vector<std::string> lines;
  for (std::size_t i = 0; i < sequences_of_source.size(); ++i) {
    const double epochs = static_cast<double>(run.train.steps * run.train.global_batch) * share_of(run, i) /
                          static_cast<double>(sequences_of_source[i]);
    if (epochs > kManyEpochs)
      lines.push_back(fmt::format("the whole run goes {:.3g} times through {} ({} sequences)", epochs,
                                  run.data.train[i].path, sequences_of_source[i]));
  }
  return lines;
}

void log_run_summary(const Session& s, const TrainState& state, std::span<const HeldOutData> valid,
                     const std::string& cores) {
  const RunConfig& run = s.run;
  log_model(s, state);
  log_teacher(s);
  log_data(s, state, valid);
  log::info("ranks: {} as {}; {}{}", s.mesh.world().size(), s.mesh.spec().str(), name_of(run.train.precision),
            cores.empty() ? "" : "; " + cores);
  if (s.plan.stages > 1) log::info("pipeline by cost: {}", describe(s.plan));
  const std::string for_good =
      run.checkpoint.keep_every > 0
          ? fmt::format(", and those of every {} steps for good", run.checkpoint.keep_every)
          : "";
  const std::string checkpoints = run.checkpoint.every > 0
                                      ? fmt::format("checkpoints every {} steps, the newest {} kept{}",
                                                    run.checkpoint.every, run.checkpoint.keep, for_good)
                                      : "one checkpoint, at the end";
  log::info("output: {}: {}", fs::absolute(run.run.dir).lexically_normal().string(), checkpoints);
  for (const std::string& note : run.notes) log::warning("{}", note);
  for (const std::string& note : without_effect(run, s.config)) log::warning("{}", note);
}

void write_run_config(const fs::path& run_dir, const RunConfig& run, std::int64_t first_step,
                      const std::vector<ConfigChange>& changes) {
  const fs::path path = run_dir / "config.yaml";
  std::string history, line;
  // The comments at its head are the run's history, one line for each change of a key, and stay when the file is
  // rewritten.
  if (first_step > 1)  // else an earlier run left the file
    for (std::ifstream old(path); std::getline(old, line) && line.starts_with("#");) history += line + "\n";
  for (const ConfigChange& change : changes)
    history += fmt::format("# from step {} on: {}\n", first_step, change.str());
  replace_text(path, history + to_yaml(run));
}

}  // namespace upmoe
