#include "configs/lora_record.h"

#include <fmt/format.h>

#include <algorithm>
#include <set>
#include <string_view>

#include "configs/adapter_params.h"
#include "configs/families/family.h"
#include "configs/json_reader.h"
#include "configs/json_writer.h"

namespace upmoe {
namespace {

constexpr const char* kKey = "upmoe_lora";

std::vector<LoraTarget> in_order(const std::vector<LoraTarget>& targets) {
  std::vector<LoraTarget> sorted = targets;
  std::sort(sorted.begin(), sorted.end());
  return sorted;
}

std::vector<std::string> names_of(const std::vector<LoraTarget>& targets) {
  std::vector<std::string> names;
  for (const LoraTarget t : in_order(targets)) names.emplace_back(name_of(t));
  return names;
}

// Why the tensor that holds this part has no module of its own in transformers, to which PEFT could add an adapter;
// empty where it has.
std::string why_no_module(const Family& family, const AdaptedPart& part) {
  const auto names = family.tensors;
  for (const TensorName& name : names) {
    if (name.role != part.role || name.half != part.half) continue;
    const auto same = [&](const TensorName& t) { return std::string_view(t.name) == name.name; };
    if (std::count_if(names.begin(), names.end(), same) > 1)
      return fmt::format("{} holds other weights as well", name.name);
    const bool routed = part.role == Role::kExpertGateUp || part.role == Role::kExpertDown;
    if (name.transposed || (routed && !name.by_expert()))
      return fmt::format("{} holds those of all experts", name.name);
  }
  return "";
}

std::set<Role> roles_in(const ModelConfig& model) {
  std::set<Role> roles;
  for (const ParamSpec& p : make_param_table(model)) roles.insert(p.role);
  return roles;
}

}  // namespace

void read_lora(JsonObject& json, ModelConfig& c) {
  if (!json.has(kKey)) return;
  const std::unique_ptr<JsonObject> lora = json.object(kKey);
  if (lora == nullptr) return;
  c.lora.rank = static_cast<int>(lora->integer("rank", 1, kMostLoraRank, true).value_or(1));
  c.lora.alpha = lora->number("alpha", true).value_or(1);
  if (!(c.lora.alpha > 0)) lora->refuse("alpha", fmt::format("found {}, expected more than 0", c.lora.alpha));
  // A list of names, each known and once, in their order: as it is written.
  c.lora.targets.clear();
  const auto names = lora->texts("targets", true);
  if (!names) return;
  bool good = !names->empty();
  for (const std::string& name : *names) {
    const std::optional<LoraTarget> target = value_named<LoraTarget>(name);
    good = good && target && (c.lora.targets.empty() || c.lora.targets.back() < *target);
    if (good) c.lora.targets.push_back(*target);
  }
  if (!good)
    lora->refuse("targets", fmt::format("found {}, expected some of {} in order", lora->as_text("targets"),
                                        fmt::join(name_list<LoraTarget>().built, ", ")));
}

void write_lora(const ModelConfig& c, JsonWriter& json) {
  json.erase(kKey);
  if (!c.lora.given()) return;
  JsonWriter lora;
  lora.set("rank", c.lora.rank);
  lora.set("alpha", c.lora.alpha);
  lora.set("targets", names_of(c.lora.targets));
  json.set(kKey, lora);
}

ModelConfig with_lora(ModelConfig model, const LoraForm& lora) {
  if (!lora.given()) {
    model.lora = {};
    return model;
  }
  model.lora = lora;
  model.lora.targets = in_order(lora.targets);
  return model;
}

bool same_lora(const LoraForm& one, const LoraForm& two) {
  if (!one.given() || !two.given()) return one.given() == two.given();
  return one.rank == two.rank && one.alpha == two.alpha && in_order(one.targets) == in_order(two.targets);
}

std::string words_of(const LoraForm& form) {
  if (!form.given()) return "none";
  return fmt::format("rank {}, alpha {}, targets {}", form.rank, form.alpha,
                     fmt::join(names_of(form.targets), " "));
}

void require_same_lora(const ModelConfig& model, const ModelConfig& asked, const std::string& where,
                       bool goes_on) {
  if (same_lora(model.lora, asked.lora) || (!model.lora.given() && !goes_on)) return;
  if (!model.lora.given())
    fail(ExitCode::kUsage,
         "lora: the run asks for adapters ({}), but it has trained without them so far, in {}; train them in "
         "another run.dir, with this checkpoint as model.path",
         words_of(asked.lora), where);
  fail(ExitCode::kUsage,
       "lora: the run asks for adapters ({}), but {} holds others ({}); ask for the same, or merge them "
       "first: upmoe export --merge",
       words_of(asked.lora), where, words_of(model.lora));
}

std::vector<std::string> lora_problems(const RunConfig& run, const ModelConfig& model) {
  std::vector<std::string> found;
  if (!model.lora.given()) return found;
  const std::set<Role> roles = roles_in(model);
  bool routed = false;
  for (const LoraTarget target : model.lora.targets)
    for (const AdaptedPart& part : parts_of(target)) {
      if (!roles.contains(part.role)) continue;
      routed |= part.role == Role::kExpertGateUp || part.role == Role::kExpertDown;
      const std::string why = why_no_module(family_of(model), part);
      if (!why.empty())
        found.push_back(
            fmt::format("lora.targets: {}: in a {} no module has this weight alone: {}. "
                        "PEFT's format would have no name for its adapter; leave it out",
                        name_of(target), model.model_type, why));
    }
  if (model.num_moe_layers() > 0 && run.router.bias_rate > 0)
    found.push_back(fmt::format(
        "router.bias_rate: {} changes the routers' biases, and beside adapters the model stays as it is: "
        "PEFT's format has no place for them; use 0",
        run.router.bias_rate));
  if (routed && run.kernels.experts == ExpertsPath::kFused)
    found.push_back(
        "kernels.experts: fused computes an expert's products "
        "at once, and adapters stand beside each; use auto");
  return found;
}

}  // namespace upmoe
