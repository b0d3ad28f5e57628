#include "configs/model_config.h"

#include <fmt/format.h>

#include <algorithm>
#include <string_view>

#include "configs/families/family.h"
#include "configs/json_reader.h"
#include "configs/json_writer.h"
#include "configs/lora_record.h"
#include "configs/model_folder.h"
#include "configs/router_record.h"

namespace upmoe {
namespace {

void read_fields(JsonObject& json, ModelConfig& c) {
  const auto type = json.text("model_type", true);
  const Family* family = find_family(type ? *type : c.model_type);
  if (family == nullptr) {
    std::vector<std::string> known;
    for (const Family* f : families()) known.emplace_back(f->model_type);
    json.refuse("model_type", fmt::format("found '{}', expected {}", *type, fmt::join(known, " or ")));
    return;  // the other keys mean something else there
  }
  c.model_type = family->model_type;
  family->read(json, c);
  read_router(json, c);
  read_lora(json, c);
}

}  // namespace

bool ModelConfig::is_moe_layer(int layer) const {
  return num_experts > 0 && layer >= first_k_dense_replace && (layer + 1) % decoder_sparse_step == 0 &&
         std::find(mlp_only_layers.begin(), mlp_only_layers.end(), layer) == mlp_only_layers.end();
}

int ModelConfig::num_moe_layers() const {
  int count = 0;
  for (int layer = 0; layer < num_hidden_layers; ++layer) count += is_moe_layer(layer) ? 1 : 0;
  return count;
}

ModelConfig parse_model_config(const std::string& json_text, const std::string& where) {
  ModelConfig config;
  Problems problems;
  JsonObject json(json_text, where, problems);
  if (problems.empty()) read_fields(json, config);
  problems.throw_if_any(ExitCode::kBadInput, where);
  config.raw_json = json_text;
  return config;
}

ModelConfig read_model_config(const std::filesystem::path& path) {
  const bool directory = std::filesystem::is_directory(path);
  const std::filesystem::path file = directory ? path / "config.json" : path;
  if (!directory && (path.extension() == ".yaml" || path.extension() == ".yml"))
    fail(ExitCode::kBadInput,
         "{}: a YAML file, of a run or a recipe, where a model's config.json is expected: name the model "
         "(a run's is its model.path); what a run costs is told by upmoe plan",
         path.string());
  std::string text;
  try {
    text = read_text_file(file);
  } catch (const Error& e) {
    throw Error(ExitCode::kBadInput, std::string(e.what()) +
                                         "; expected the config.json of a Hugging Face model" +
                                         model_folder_hint(path));
  }
  return parse_model_config(text, file.string());
}

std::string to_hf_json(const ModelConfig& config) {
  const Family& family = family_of(config);
  const Traits lacking = traits_of(config).without(family.carries | kRouterTraits);
  UPMOE_CHECK(lacking.none(), "a {} has no {}", config.model_type, lacking.words());
  JsonWriter json(config.raw_json);
  json.set("architectures", std::vector<std::string>{family.architecture});
  json.set("model_type", config.model_type);
  family.write(config, json);
  write_router(config, json);
  write_lora(config, json);
  // What it was made of may have been of another family.
  const auto is_own = [&](const char* key) {
    return std::find(family.keys.begin(), family.keys.end(), std::string_view(key)) != family.keys.end();
  };
  for (const Family* other : families())
    for (const char* key : other->keys)
      if (!is_own(key)) json.erase(key);
  return json.text();
}

}  // namespace upmoe
