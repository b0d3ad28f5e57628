// upmoe inspect: what a model directory, a checkpoint or a token file holds.

#include <fmt/ranges.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <nlohmann/json.hpp>

#include "configs/model_folder.h"
#include "data/checkpoint_folder.h"
#include "data/hf_model.h"
#include "data/model_source.h"
#include "data/shard_store.h"
#include "data/token_dataset.h"
#include "kernels/core/log.h"
#include "launch/command_line.h"
#include "launch/commands.h"
#include "launch/output.h"

namespace upmoe {

namespace {

namespace fs = std::filesystem;
using nlohmann::json;

struct InspectArguments {
  std::string path, diff;
  bool verify = false, as_json = false;
};

json shape_json(const Shape& s) {
  return std::vector<std::int64_t>(s.dim.begin(), s.dim.begin() + s.rank);
}

json describe_tokens(const fs::path& path, bool verify) {
  const TokenFile file(path);
  json j{{"kind", "token file"},
         {"tokens", file.num_tokens()},
         {"documents", file.document_ends().size()},
         {"vocab_size", file.vocab_size()},
         {"eos_id", file.eos_id()},
         {"tokenizer_sha256", file.tokenizer_sha256()},
         {"checksums", file.checksummed()}};
  if (verify) {
    file.verify();
    j["verified"] = true;
  }
  return j;
}

// Slice by slice of the first dimension: an expert parameter does not fit into memory twice.
void require_finite(const fs::path& path, const std::string& name, const Box& box,
                    const std::function<void(const Box&, TensorView)>& read) {
  std::int64_t bad = 0;
  Box slice = box;
  slice.extent.dim[0] = 1;
  const std::int64_t at_once =
      std::max<std::int64_t>(1, (1 << 22) / std::max<std::int64_t>(1, slice.elements()));
  const std::int64_t end = box.offset[0] + box.extent[0];
  std::vector<float> values;
  for (; slice.offset[0] < end; slice.offset.dim[0] += slice.extent[0]) {
    slice.extent.dim[0] = std::min(at_once, end - slice.offset[0]);
    values.resize(static_cast<std::size_t>(slice.extent.elements()));
    read(slice, host_view(values.data(), slice.extent));
    bad += std::count_if(values.begin(), values.end(), [](float v) { return !std::isfinite(v); });
  }
  if (bad > 0)
    fail(ExitCode::kBadInput, "{}: tensor '{}' holds {} values that are not finite", path.string(), name,
         bad);
}

json describe_checkpoint(const fs::path& path, bool verify) {
  const ShardStore store(path);
  const json run = json::parse(store.metadata_json(), nullptr, false);
  if (!run.is_object())
    fail(ExitCode::kBadInput, "{}: 'run' is not an object", (path / "manifest.json").string());
  json j{{"kind", "checkpoint"}, {"tensors", json::array()}};
  for (const char* key : {"step", "samples", "tokens", "mesh", "source"})
    if (run.contains(key)) j[key] = run[key];
  for (const auto& [key, t] : store.tensors())
    j["tensors"].push_back({{"name", key.first},
                            {"kind", key.second},
                            {"dtype", name_of(t.dtype)},
                            {"shape", shape_json(t.shape)}});
  if (verify) {
    store.verify();
    for (const auto& [key, t] : store.tensors())
      if (key.second == "weight")
        require_finite(path, key.first, whole(t.shape),
                       [&](const Box& box, TensorView out) { store.read(key.first, key.second, box, out); });
    j["verified"] = true;
  }
  return j;
}

json describe_hf(const fs::path& path, bool verify) {
  const HfModel model(path);
  const ParamCounts counts = count_params(model.config());
  json j{{"kind", "model directory"},   {"model_type", model.config().model_type},
         {"parameters", counts.total},  {"activated", counts.activated},
         {"bytes", model.data_bytes()}, {"tensors", json::array()}};
  for (const SafetensorsEntry* e : model.tensors())
    j["tensors"].push_back({{"name", e->name}, {"dtype", e->dtype}, {"shape", e->shape}});
  if (verify) {  // nothing stores a checksum here, but every byte is read
    for (const ParamSpec& p : make_param_table(model.config()))
      for (const HfTensor& t : hf_tensors_of(model.config(), p))
        require_finite(path, t.name, t.part,
                       [&](const Box& box, TensorView out) { model.read(p, box, out); });
    j["verified"] = true;
  }
  return j;
}

fs::path resolve(const fs::path& path) {  // a run directory stands for its newest checkpoint
  return fs::is_directory(path / "checkpoints") ? newest_checkpoint(path) : path;
}

json describe(const fs::path& given, bool verify) {
  const fs::path path = resolve(given);
  if (fs::is_regular_file(path)) return describe_tokens(path, verify);
  if (fs::exists(path / "manifest.json")) return describe_checkpoint(path, verify);
  if (fs::exists(path / "config.json")) return describe_hf(path, verify);
  fail(ExitCode::kBadInput, "{}: {}{}", path.string(),
       fs::exists(path) ? "neither a model directory, a checkpoint nor a token file" : "does not exist",
       model_folder_hint(path));
}

// Largest absolute and relative L2 distance of two parameters of one shape; null when they are equal.
// Elements that are not finite in one of them enter no distance: they are counted, unless the bits agree.
json distance(const ModelSource& one, const ModelSource& two, const ParamSpec& p) {
  const auto n = static_cast<std::size_t>(p.shape.elements());
  std::vector<float> x(n), y(n);
  one.read(p, whole(p.shape), host_view(x.data(), p.shape));
  two.read(p, whole(p.shape), host_view(y.data(), p.shape));
  double largest = 0, squares = 0, norm = 0;
  std::int64_t not_finite = 0;
  for (std::size_t i = 0; i < n; ++i) {
    if (!std::isfinite(x[i]) || !std::isfinite(y[i])) {
      if (std::bit_cast<std::uint32_t>(x[i]) != std::bit_cast<std::uint32_t>(y[i])) ++not_finite;
      continue;
    }
    const double d = double(y[i]) - double(x[i]);
    largest = std::max(largest, std::abs(d));
    squares += d * d;
    norm += double(x[i]) * double(x[i]);
  }
  if (largest == 0 && not_finite == 0) return nullptr;
  json row{{"name", p.name},
           {"max_abs", largest},
           {"relative_l2", norm > 0 ? json(std::sqrt(squares / norm)) : json(nullptr)}};
  if (not_finite > 0) row["not_finite"] = not_finite;
  return row;
}

// Parameter by parameter; those that are equal are left out.
json difference(const fs::path& a, const fs::path& b) {
  const auto one = open_model(a), two = open_model(b);
  json rows = json::array();
  std::map<std::string, ParamSpec> other;
  for (const ParamSpec& p : make_param_table(two->config()))
    if (two->has(p)) other.emplace(p.name, p);
  for (const ParamSpec& p : make_param_table(one->config())) {
    if (!one->has(p)) continue;
    const auto it = other.find(p.name);
    if (it == other.end()) {
      rows.push_back({{"name", p.name}, {"differs", "only in the first"}});
      continue;
    }
    if (it->second.shape == p.shape) {
      if (json row = distance(*one, *two, p); !row.is_null()) rows.push_back(std::move(row));
    } else {
      rows.push_back({{"name", p.name},
                      {"differs", "shape"},
                      {"shapes", {shape_json(p.shape), shape_json(it->second.shape)}}});
    }
    other.erase(it);
  }
  for (const auto& [name, p] : other) rows.push_back({{"name", name}, {"differs", "only in the second"}});
  return rows;
}

std::string plain(const json& j) {
  std::string out;
  for (const auto& [key, value] : j.items())
    if (key != "tensors" && key != "difference")
      out += fmt::format("{:18} {}\n", key, value.is_string() ? value.get<std::string>() : value.dump());
  if (j.contains("tensors")) {
    out += fmt::format("{} tensors\n", j["tensors"].size());
    for (const json& t : j["tensors"])
      out += fmt::format("  {:60} {:7} {:5} {}\n", t["name"].get<std::string>(), t.value("kind", ""),
                         t["dtype"].get<std::string>(), t["shape"].dump());
  }
  if (!j.contains("difference")) return out;
  out += fmt::format("{} parameters differ\n", j["difference"].size());
  for (const json& d : j["difference"]) out += fmt::format("  {}\n", d.dump());
  return out;
}

int run_inspect(const InspectArguments& a, Runtime& runtime) {
  run_agreed(runtime.world(), [&] {
    if (runtime.world().rank() != 0) return;
    json j = describe(a.path, a.verify);
    if (!a.diff.empty()) j["difference"] = difference(a.path, a.diff);
    print_result(a.as_json ? j.dump() + "\n" : plain(j));
  });
  return 0;
}

}  // namespace

void add_inspect(CLI::App& app, Handler& handler) {
  auto a = std::make_shared<InspectArguments>();
  CLI::App* command = app.add_subcommand("inspect", "What a model directory, checkpoint or token file holds");
  as_path(command->add_option("path", a->path, "Model directory, checkpoint, run directory or token file")
              ->required());
  as_path(command->add_option("--diff", a->diff, "Compare with another model directory or checkpoint"));
  command->add_flag("--verify", a->verify,
                    "Read everything: checksums, non-finite values, tokens beyond the vocabulary");
  command->add_flag("--json", a->as_json, "One JSON object on standard output");
  command->callback([a, &handler] { handler = [a](Runtime& runtime) { return run_inspect(*a, runtime); }; });
}

}  // namespace upmoe
