#include "data/peft_adapter.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>
#include <string_view>

#include "configs/adapter_params.h"
#include "configs/json_reader.h"
#include "configs/lora_record.h"
#include "data/box_runs.h"
#include "data/folder.h"
#include "data/hf_names.h"
#include "data/posix_file.h"
#include "data/staged_directory.h"
#include "data/stored_values.h"
#include "data/tensor_differences.h"
#include "kernels/core/log.h"
#include "parallel/watchdog.h"

namespace upmoe {

namespace fs = std::filesystem;
using nlohmann::json;

namespace {

constexpr const char *kConfig = "adapter_config.json", *kTensors = "adapter_model.safetensors";
constexpr const char* kBaseDigest = "upmoe_base";
constexpr std::uint64_t kMostConfigBytes = std::uint64_t{1} << 20;
constexpr std::string_view kWeight = ".weight";

// "model.layers.0.self_attn.q_proj" of its weight's name.
std::string module_of(const std::string& tensor) {
  return tensor.substr(0, tensor.size() - kWeight.size());
}

std::string last_part(const std::string& module) {
  return module.substr(module.rfind('.') + 1);
}

PeftTensor tensor_of(const ParamSpec& adapter, const HfTensor& weight) {
  const bool is_a = adapter.adapts->factor == AdapterFactor::kA;
  PeftTensor t;
  t.name = fmt::format("base_model.model.{}.lora_{}.weight", module_of(weight.name), is_a ? 'A' : 'B');
  t.param = adapter;
  t.part = whole(adapter.shape);
  if (adapter.expert) {
    t.part.offset.dim[0] = weight.expert;
    t.part.extent.dim[0] = 1;
  }
  const std::int64_t rank = adapter.shape[is_a ? (adapter.expert ? 1 : 0) : -1],
                     other = t.part.elements() / rank;
  t.shape = is_a ? std::vector{rank, other} : std::vector{other, rank};
  return t;
}

// The weights' tensors that an adapter stands beside: of its half, one for each expert.
std::vector<HfTensor> adapted_tensors(const ModelConfig& config, const ParamSpec& adapter) {
  const ParamSpec weight = make_param(config, adapter.adapts->part.role, adapter.layer);
  std::vector<HfTensor> tensors;
  for (HfTensor& t : hf_tensors_of(config, weight))
    if (t.half == adapter.adapts->part.half) tensors.push_back(std::move(t));
  return tensors;
}

// What PEFT would have to be told to find these modules and no others.
std::vector<std::string> target_modules(const ModelConfig& config) {
  std::set<std::string> names;
  for (const ParamSpec& p : make_param_table(config))
    if (p.adapts)
      for (const HfTensor& t : adapted_tensors(config, p)) names.insert(last_part(module_of(t.name)));
  return {names.begin(), names.end()};
}

std::string config_of(const PeftOutput& output, const ModelConfig& config) {
  const json none = nullptr;
  return json{{"peft_type", "LORA"},
              {"task_type", "CAUSAL_LM"},
              {"base_model_name_or_path", output.base.empty() ? none : json(output.base)},
              {"r", config.lora.rank},
              {"lora_alpha", config.lora.alpha},
              {"lora_dropout", 0.0},
              {"target_modules", target_modules(config)},
              {"bias", "none"},
              {"fan_in_fan_out", false},
              {"init_lora_weights", true},
              {"inference_mode", true},
              {"modules_to_save", none},
              {"layers_to_transform", none},
              {"rank_pattern", json::object()},
              {"alpha_pattern", json::object()},
              {"use_rslora", false},
              {"use_dora", false}}
             .dump(2) +
         "\n";
}

}  // namespace

std::vector<PeftTensor> peft_tensors_of(const ModelConfig& config) {
  std::vector<PeftTensor> tensors;
  for (const ParamSpec& p : make_param_table(config)) {
    if (!p.adapts) continue;
    for (const HfTensor& weight : adapted_tensors(config, p)) tensors.push_back(tensor_of(p, weight));
  }
  return tensors;
}

void write_peft_adapter(const PeftOutput& output, const ModelConfig& config, const ReadTensor& read) {
  const std::vector<PeftTensor> tensors = peft_tensors_of(config);
  UPMOE_CHECK(!tensors.empty(), "a {} without adapters", config.model_type);
  std::vector<SafetensorsEntry> entries;
  for (const PeftTensor& t : tensors)
    entries.push_back({t.name, output.dtype == DType::kBF16 ? "BF16" : "F32", t.shape, 0, 0});
  std::map<std::string, std::string> metadata{{"format", "pt"}};
  if (!output.base_digest.empty()) metadata[kBaseDigest] = output.base_digest;
  const std::string header = make_safetensors_header(entries, metadata), words = config_of(output, config);
  StagedDirectory stage(output.dir, output.inputs);
  require_free_space(stage.target(), header.size() + entries.back().end + words.size());
  stage.create();
  PosixFile file = PosixFile::create(stage.path() / kTensors);
  file.write(std::as_bytes(std::span(header)));
  std::vector<std::byte> buffer;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    watchdog::heartbeat();
    buffer.resize(static_cast<std::size_t>(entries[i].end - entries[i].begin));
    read(tensors[i].param, tensors[i].part,
         TensorView{buffer.data(), tensors[i].part.extent, output.dtype, {}});
    file.write(buffer);
  }
  file.sync();
  write_text_synced(stage.path() / kConfig, words);
  stage.commit();
}

namespace {

// What a value says that asks for nothing.
bool is_nothing(const json& value) {
  return value.is_null() || value == false || value == "none" || value == 0 ||
         ((value.is_array() || value.is_object() || value.is_string()) && value.empty());
}

// Of PEFT's keys those whose values change what an adapter computes or where it stands.
constexpr const char* kNotMerged[] = {"use_dora",
                                      "use_rslora",
                                      "fan_in_fan_out",
                                      "bias",
                                      "lora_bias",
                                      "modules_to_save",
                                      "layers_to_transform",
                                      "rank_pattern",
                                      "alpha_pattern",
                                      "exclude_modules",
                                      "target_parameters",
                                      "megatron_config",
                                      "layer_replication",
                                      "trainable_token_indices",
                                      "alora_invocation_tokens",
                                      "use_qalora",
                                      "use_bdlora",
                                      "kasa_config",
                                      "arrow_config",
                                      "velora_config"};
// And those that say nothing of it, or are read.
constexpr const char* kPassedOver[] = {
    "peft_type",          "peft_version",   "auto_mapping",      "base_model_name_or_path",
    "revision",           "inference_mode", "task_type",         "r",
    "lora_alpha",         "lora_dropout",   "target_modules",    "init_lora_weights",
    "layers_pattern",     "megatron_core",  "qalora_group_size", "loftq_config",
    "eva_config",         "corda_config",   "lora_ga_config",    "runtime_config",
    "ensure_weight_tying"};

// Beginnings that change the weights themselves, so that the adapter belongs beside others than the model's.
bool changes_weights(const json& init) {
  if (!init.is_string()) return false;
  const std::string how = init.get<std::string>();
  const auto begins = [&](const char* word) { return how.starts_with(word); };
  return begins("pissa") || begins("olora") || begins("corda") || begins("loftq") || begins("lora_ga");
}

// Targets by the names that this model's modules have, of those that it has.
std::map<std::string, LoraTarget> targets_by_name(const ModelConfig& base) {
  std::map<std::string, LoraTarget> targets;
  for (const auto& [target, name] : kNames<LoraTarget>.built) {
    const ModelConfig adapted = with_lora(base, {1, 1, {target}});
    if (!lora_problems({}, adapted).empty()) continue;  // no module of its own
    for (const PeftTensor& t : peft_tensors_of(adapted)) {
      const std::string module = t.name.substr(0, t.name.rfind(".lora_"));
      targets.emplace(last_part(module), target);
    }
  }
  return targets;
}

}  // namespace

PeftAdapter::PeftAdapter(const fs::path& dir, const ModelConfig& base) : dir_(dir), config_(base) {
  for (const char* name : {kConfig, kTensors})
    if (!fs::is_regular_file(dir / name))
      fail(ExitCode::kBadInput, "{}: holds no {}; expected a folder with an adapter as PEFT writes it",
           dir.string(), name);
  UPMOE_CHECK(!base.lora.given(), "adapters beside adapters");
  read_form();
  file_ = std::make_unique<SafetensorsFile>(dir / kTensors);
  const auto& metadata = file_->header().metadata;
  if (const auto digest = metadata.find(kBaseDigest); digest != metadata.end()) base_digest_ = digest->second;
  check_tensors();
  for (PeftTensor& t : peft_tensors_of(config_)) tensors_[t.param.name].push_back(std::move(t));
}

void PeftAdapter::read_form() {
  const std::string where = (dir_ / kConfig).string(), text = read_text(dir_ / kConfig, kMostConfigBytes);
  Problems problems;
  JsonObject object(text, where, problems);
  problems.throw_if_any(ExitCode::kBadInput, where);
  const json all = json::parse(text);
  if (const auto type = object.text("peft_type", true); type && *type != "LORA")
    object.refuse("peft_type", fmt::format("found '{}', only LORA is merged", *type));
  LoraForm form;
  form.rank = static_cast<int>(object.integer("r", 1, 1 << 12, true).value_or(1));
  form.alpha = object.number("lora_alpha", true).value_or(1);
  if (!(form.alpha > 0))
    object.refuse("lora_alpha", fmt::format("found {}, expected more than 0", form.alpha));
  for (const char* key : kNotMerged)
    if (all.contains(key) && !is_nothing(all[key]))
      object.refuse(key, fmt::format("found {}, which merging does not do", all[key].dump()));
  for (const auto& [key, value] : all.items())
    if (!is_nothing(value) &&
        std::none_of(std::begin(kNotMerged), std::end(kNotMerged), [&](const char* k) { return key == k; }) &&
        std::none_of(std::begin(kPassedOver), std::end(kPassedOver), [&](const char* k) { return key == k; }))
      log::warning("{}: {}: {} is not known here; the adapter is taken as one without it", where, key,
                   value.dump());
  if (const json init = all.value("init_lora_weights", json()); changes_weights(init))
    object.refuse("init_lora_weights",
                  fmt::format("found {}: the model's weights were changed for it", init.dump()));
  base_ = object.text("base_model_name_or_path", false).value_or("");
  form.targets.clear();
  const std::map<std::string, LoraTarget> known = targets_by_name(config_);
  std::vector<std::string> names;
  for (const auto& [name, target] : known) names.push_back(name);
  const json modules = all.value("target_modules", json());
  if (!modules.is_array() || modules.empty())
    object.refuse("target_modules", fmt::format("found {}, expected a list of names", modules.dump()));
  for (const json& module : modules.is_array() ? modules : json::array()) {
    const auto found = module.is_string() ? known.find(module.get<std::string>()) : known.end();
    if (found == known.end()) {
      object.refuse("target_modules",
                    fmt::format("{} is no module of this {}, which has {}: an adapter of another model",
                                module.dump(), config_.model_type, fmt::join(names, ", ")));
    } else if (!form.has(found->second)) {
      form.targets.push_back(found->second);
    }
  }
  problems.throw_if_any(ExitCode::kBadInput, where);
  config_ = with_lora(config_, form);
}

void PeftAdapter::check_tensors() const {
  TensorDifferences differences;
  for (const PeftTensor& t : peft_tensors_of(config_))
    differences.expect(t.name, t.shape, file_->find(t.name));
  for (const SafetensorsEntry& e : file_->header().entries)
    if (!differences.expects(e.name)) differences.add(e.name, "not an adapter of this model");
  differences.throw_if_any(
      fmt::format("{}: the adapter ({}) is one of another model", dir_.string(), words_of(config_.lora)));
}

void PeftAdapter::read(const ParamSpec& param, const Box& box, TensorView out) const {
  const auto found = tensors_.find(param.name);
  UPMOE_CHECK(found != tensors_.end() && out.elements() == box.elements(), "{} {}", param.name,
              box.extent.str());
  std::vector<std::byte> stored;
  for (const PeftTensor& t : found->second) {
    const Box region = intersect(t.part, box);
    if (region.elements() == 0) continue;
    const SafetensorsEntry* e = file_->find(t.name);
    stored.resize(static_cast<std::size_t>(e->end - e->begin));
    file_->read(*e, 0, stored);
    const std::size_t size = stored_size(e->dtype);
    for_runs(t.part, box, region, [&](std::int64_t from, std::int64_t to, std::int64_t n) {
      convert_stored(stored.data() + static_cast<std::size_t>(from) * size, e->dtype, n, out, to);
    });
  }
}

}  // namespace upmoe
