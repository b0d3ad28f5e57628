// upmoe inspect: what a model directory, a checkpoint or a token file holds, and which experts a model chooses.

#include <fmt/ranges.h>

#include <nlohmann/json.hpp>

#include "configs/model_folder.h"
#include "data/checkpoint_folder.h"
#include "data/finite_values.h"
#include "data/hf_model.h"
#include "data/model_diff.h"
#include "data/run_metadata.h"
#include "data/shard_store.h"
#include "data/token_dataset.h"
#include "kernels/core/log.h"
#include "launch/command_line.h"
#include "launch/commands.h"
#include "launch/output.h"
#include "launch/routing_inspection.h"

namespace upmoe {

namespace {

namespace fs = std::filesystem;
using nlohmann::json;

struct InspectArguments {
  std::string path, diff;
  bool verify = false, as_json = false, routing = false;
  RoutingRequest request;
};

json shape_json(const Shape& s) {
  return std::vector<std::int64_t>(s.dim.begin(), s.dim.begin() + s.rank);
}

json describe_tokens(const fs::path& path, bool verify) {
  const std::unique_ptr<const TokenFile> file = open_token_file(path);
  json j{{"kind", "token file"},
         {"format", file->format()},
         {"tokens", file->num_tokens()},
         {"documents", file->document_ends().size()},
         {"vocab_size", file->vocab_size() == 0 ? json() : json(file->vocab_size())},
         {"eos_id", file->eos_id()},
         {"tokenizer_sha256", file->tokenizer_sha256()},
         {"checksums", file->checksummed()},
         {"loss_mask", file->has_loss_mask()}};
  if (verify) {
    file->verify();
    j["verified"] = true;
  }
  return j;
}

json describe_checkpoint(const fs::path& path, bool verify) {
  const ShardStore store(path);
  const RunMetadata run = run_metadata_of(store);
  json j{{"kind", "checkpoint"}, {"step", run.step},     {"samples", run.samples},
         {"tokens", run.tokens}, {"source", run.source}, {"tensors", json::array()}};
  if (run.mesh) j["mesh"] = *run.mesh;
  for (const auto& [key, t] : store.tensors())
    j["tensors"].push_back({{"name", key.first},
                            {"kind", key.second},
                            {"dtype", name_of(t.dtype)},
                            {"shape", shape_json(t.shape)}});
  if (verify) {
    store.verify();
    require_finite(store);
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
    require_finite(model);
    j["verified"] = true;
  }
  return j;
}

json describe(const fs::path& given, bool verify) {
  const fs::path path = newest_if_run(given);
  if (fs::is_regular_file(path) && path.extension() == ".safetensors")  // a token file has any other name
    fail(ExitCode::kBadInput,
         "{}: a file of tensors, expected a model directory, a checkpoint or a token file{}", path.string(),
         model_folder_hint(path));
  if (fs::is_regular_file(path)) return describe_tokens(path, verify);
  if (fs::exists(path / "manifest.json")) return describe_checkpoint(path, verify);
  if (fs::exists(path / "config.json")) return describe_hf(path, verify);
  fail(ExitCode::kBadInput, "{}: {}{}", path.string(),
       fs::exists(path) ? "neither a model directory, a checkpoint nor a token file" : "does not exist",
       model_folder_hint(path));
}

json difference_json(const ParamDifference& d) {
  using Kind = ParamDifference::Kind;
  json row{{"name", d.name}};
  switch (d.kind) {
    case Kind::kOnlyInFirst:
      row["differs"] = "only in the first";
      break;
    case Kind::kOnlyInSecond:
      row["differs"] = "only in the second";
      break;
    case Kind::kShape:
      row["differs"] = "shape";
      row["shapes"] = {shape_json(d.first), shape_json(d.second)};
      break;
    case Kind::kValues:
      row["max_abs"] = d.max_abs;
      row["relative_l2"] = d.relative_l2 ? json(*d.relative_l2) : json(nullptr);
      if (d.not_finite > 0) row["not_finite"] = d.not_finite;
  }
  return row;
}

json difference(const fs::path& first, const fs::path& second) {
  const auto one = open_model(first), two = open_model(second);
  json rows = json::array();
  for (const ParamDifference& d : differences(*one, *two)) rows.push_back(difference_json(d));
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

void check(const InspectArguments& a) {
  if (a.routing && (a.verify || !a.diff.empty()))
    fail(ExitCode::kUsage, "--routing: not together with --verify or --diff");
  if (a.routing && a.request.tokens.empty())
    fail(ExitCode::kUsage, "--routing: give token files behind the model; each is a source");
  if (!a.routing && !a.request.tokens.empty())
    fail(ExitCode::kUsage, "'{}': one path is inspected; token files behind it are for --routing",
         a.request.tokens.front());
}

int run_inspect(const InspectArguments& a, Runtime& runtime) {
  check(a);
  if (a.routing) return runtime.world().rank() == 0 ? inspect_routing(a.request, a.as_json) : 0;
  run_agreed(runtime.world(), [&] {
    if (runtime.world().rank() != 0) return;
    json j = describe(a.path, a.verify);
    if (!a.diff.empty()) {  // `inspect --diff A B` reads as if A were the first
      j["first"] = a.path;
      j["second"] = a.diff;
      j["difference"] = difference(a.path, a.diff);
    }
    print_result(a.as_json ? j.dump() + "\n" : plain(j));
  });
  return 0;
}

}  // namespace

void add_inspect(CLI::App& app, Handler& handler) {
  auto a = std::make_shared<InspectArguments>();
  CLI::App* command = app.add_subcommand(
      "inspect", "What a model directory, checkpoint or token file holds; which experts a model chooses");
  as_path(command->add_option("path", a->path, "Model directory, checkpoint, run directory or token file")
              ->required());
  as_path(command->add_option(
      "--diff", a->diff, "Compare PATH, the first, with another model directory or checkpoint, the second"));
  command->add_flag("--verify", a->verify,
                    "Read everything: checksums, non-finite values, tokens beyond the vocabulary");
  command->add_flag("--json", a->as_json, "One JSON object on standard output");
  RoutingRequest& request = a->request;
  command->add_flag(
      "--routing", a->routing,
      "Which experts the model chooses, by source, place in the sequence and class of token, and how "
      "often neighbours choose the same ones");
  as_path(command->add_option("tokens", request.tokens, "With --routing: token files, each a source"));
  command->add_option("--seq-len", request.seq_len, "With --routing: tokens per sequence")
      ->check(above_zero())
      ->capture_default_str();
  command->add_option("--sequences", request.sequences, "With --routing: the first N of each source (0: all)")
      ->check(zero_or_above())
      ->capture_default_str();
  command->add_option("--micro-batch", request.micro_batch, "With --routing: sequences at once")
      ->check(above_zero())
      ->capture_default_str();
  add_choice(*command, "--precision", request.precision, "With --routing: fp32 or bf16");
  as_path(
      command->add_option("--out", request.out, "With --routing: folder for routing.json and routing.png"));
  command->callback([a, &handler] {
    a->request.model = a->path;
    handler = [a](Runtime& runtime) { return run_inspect(*a, runtime); };
  });
}

}  // namespace upmoe
