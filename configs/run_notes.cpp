#include "configs/run_notes.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <utility>

#include "configs/run_problems.h"
#include "configs/run_schema.h"

namespace upmoe {
namespace {

// Sentences about keys that were changed from their defaults.
class Notes {
 public:
  explicit Notes(const RunConfig& run) {
    RunConfig copy = run, defaults;
    for (auto& [key, value] : run_schema(copy).values()) values_[key] = std::move(value);
    for (auto& [key, value] : run_schema(defaults).values()) defaults_[key] = std::move(value);
  }
  void unless(bool effective, const std::string& key, const std::string& why) {
    const std::string& value = values_.at(key);
    if (!effective && value != defaults_.at(key))
      list.push_back(fmt::format("{}: {} has no effect: {}", key, value, why));
  }
  std::vector<std::string> keys_of(const std::string& section) const {  // "router."
    std::vector<std::string> keys;
    for (const auto& [key, value] : values_)
      if (key.starts_with(section)) keys.push_back(key);
    return keys;
  }
  std::vector<std::string> list;

 private:
  std::map<std::string, std::string> values_, defaults_;
};

void add_schedule_words(const RunConfig& run, std::vector<std::string>& notes) {
  const std::int64_t steps = run.train.steps, warmup = run.schedule.warmup;
  if (warmup > steps) {
    notes.push_back(fmt::format(
        "schedule.warmup: {} steps are more than the {} of the run: the learning rate only rises, to "
        "{:.3g} at the last step",
        warmup, steps, run.optimizer.lr * static_cast<double>(steps) / static_cast<double>(warmup)));
    return;
  }
  const double decay = run.schedule.decay_fraction * static_cast<double>(steps);
  if (run.schedule.name == ScheduleKind::kWsd && decay > static_cast<double>(steps - warmup))
    notes.push_back(fmt::format(
        "schedule.decay_fraction: {} of {} steps reaches into the warm-up of {}: the decay takes the "
        "{} steps that are left",
        run.schedule.decay_fraction, steps, warmup, steps - warmup));
}

void add_ranks_without_experts(const RunConfig& run, const ModelConfig& model, const std::string& whose,
                               std::vector<std::string>& notes) {
  const std::int64_t without = ranks_without_experts(run.parallel, model);
  if (without == 0) return;
  notes.push_back(
      fmt::format("{}parallel.ep: {} ranks share {} experts, so {} of the {} hold{} no routed expert and "
                  "wait{} where the others compute theirs; with an ep of at most {} every rank holds some",
                  whose, run.parallel.ep, model.num_experts, without, run.parallel.ep,
                  without == 1 ? "s" : "", without == 1 ? "s" : "", model.num_experts));
}

}  // namespace

std::vector<std::string> words_of_ranks_without_experts(const RunConfig& run, const ModelConfig& model) {
  std::vector<std::string> notes;
  add_ranks_without_experts(run, model, "", notes);
  if (const ModelConfig* teacher = run.train.teacher.config.get(); teacher != nullptr)
    add_ranks_without_experts(run, *teacher, "train.teacher: ", notes);
  return notes;
}

std::vector<std::string> without_effect(const RunConfig& run) {
  Notes notes(run);
  const ScheduleKind schedule = run.schedule.name;
  notes.unless(schedule == ScheduleKind::kWsd, "schedule.decay_fraction",
               fmt::format("schedule.name is {}", name_of(schedule)));
  notes.unless(schedule != ScheduleKind::kConstant, "schedule.min_lr_ratio", "schedule.name is constant");
  const bool evaluates = !run.data.valid.empty();
  notes.unless(evaluates, "train.eval_every", "data.valid is not given");
  notes.unless(evaluates, "train.eval_sequences", "data.valid is not given");
  notes.unless(evaluates, "data.valid_loss_mask", "data.valid is not given");
  notes.unless(run.data.shuffle, "data.seed", "data.shuffle is false");
  notes.unless(run.train.precision != Precision::kFp32, "router.dtype", "train.precision is fp32");
  for (const char* key : {"train.teacher.weight", "train.teacher.temperature"})
    notes.unless(run.train.teacher.given(), key, "train.teacher.model is not given");
  for (const char* key : {"lora.alpha", "lora.targets"})
    notes.unless(run.lora.given(), key, "lora.rank is 0");
  notes.unless(run.device != DeviceChoice::kCpu, "optimizer.offload", "device is cpu");
  notes.unless(run.device != DeviceChoice::kCpu, "train.deterministic", "the CPU always sums in one order");
  notes.unless(run.device != DeviceChoice::kCpu, "kernels.experts", "device is cpu");
  notes.unless(run.device != DeviceChoice::kCpu && run.parallel.tp == 1, "kernels.cross_entropy",
               run.device == DeviceChoice::kCpu ? "device is cpu" : "parallel.tp divides the vocabulary");
  add_schedule_words(run, notes.list);
  return notes.list;
}

std::vector<std::string> without_effect(const RunConfig& run, const ModelConfig& model) {
  Notes notes(run);
  const bool routed = model.num_moe_layers() > 0;
  notes.unless((routed && model.router.draws()) || run.model.init == ModelInit::kRandom ||
                   run.optimizer.name == OptimizerKind::kAdamW8bit || run.lora.given(),
               "run.seed", "the weights come from model.path, and the order of the data has data.seed");
  for (const std::string& key : notes.keys_of("router."))
    if (key != "router.dtype") notes.unless(routed, key, "the model has no experts");
  // How experts are computed, of the run's teacher as well.
  const ModelConfig* teacher = run.train.teacher.config.get();
  for (const char* key : {"router.dtype", "kernels.experts"})
    notes.unless(routed || (teacher != nullptr && teacher->num_moe_layers() > 0), key,
                 "the model has no experts");
  const auto& losses = run.router.aux_loss;
  notes.unless(std::any_of(losses.begin(), losses.end(), [](double c) { return c > 0; }), "router.aux_kind",
               "router.aux_loss is 0");
  for (const char* key : {"router.capacity_pool", "router.drop"})
    notes.unless(!routed || (model.router.capacity_factor > 0 && !model.router.routes_groups()), key,
                 model.router.routes_groups() ? "experts take the best tokens of a group"
                                              : "router.capacity_factor is 0");
  const std::string kind = fmt::format("router.kind is {}", name_of(model.router.kind));
  notes.unless(!routed || model.router.routes_groups(), "router.group_size", kind);
  notes.unless(!routed || model.router.kind == RouterKind::kMixtureOfTokens, "router.temperature", kind);
  notes.unless(run.router.has_term(AuxKind::kGroup), "router.aux_groups", "router.aux_kind has no group");
  for (std::string& words : words_of_ranks_without_experts(run, model))
    notes.list.push_back(std::move(words));
  return notes.list;
}

}  // namespace upmoe
