#include "trainer/run_record.h"

#include <ctime>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>

#include "configs/expert_use.h"
#include "data/posix_file.h"
#include "data/staged_directory.h"
#include "kernels/core/log.h"
#include "trainer/run_summary.h"

namespace upmoe {

namespace fs = std::filesystem;
using nlohmann::json;

namespace {

json text_or_null(const std::string& text) {
  return text.empty() ? json(nullptr) : json(text);
}

std::string now() {
  const std::time_t seconds = std::time(nullptr);
  std::tm utc{};
  gmtime_r(&seconds, &utc);
  char words[32] = {};
  std::strftime(words, sizeof words, "%Y-%m-%dT%H:%M:%SZ", &utc);
  return words;
}

// Of the model that a run began from, while its folder is there: what an upcycling wrote beside it.
json recipe_of(const ModelSource* weights) {
  if (weights == nullptr) return nullptr;
  for (const fs::path& folder : {weights->directory(), weights->companions()}) {
    const fs::path path = folder / "upcycle_report.json";
    if (folder.empty() || !fs::is_regular_file(path)) continue;
    constexpr std::uint64_t kMost = 64 << 20;
    const json report = json::parse(read_text(path, kMost), nullptr, false);
    if (!report.is_object() || !report.contains("recipe")) {
      log::warning("{}: not a report of `upmoe upcycle`; {} is recorded without its recipe", path.string(),
                   folder.string());
      return nullptr;
    }
    json kept{{"report", fs::absolute(path).lexically_normal().string()}};
    for (const char* key : {"recipe", "source", "further_sources", "step_zero", "remark"})
      if (report.contains(key)) kept[key] = report[key];
    return kept;
  }
  return nullptr;
}

json model_of(const Session& s, const TrainState& state) {
  const ModelConfig& c = s.config;
  const ParamCounts counts = count_params(c);
  json model{{"source", state.source},          {"digest", text_or_null(state.source_digest)},
             {"start", start_of(s.run, state)}, {"type", c.model_type},
             {"layers", c.num_hidden_layers},   {"hidden_size", c.hidden_size},
             {"parameters", counts.total},      {"activated", counts.activated}};
  if (c.num_moe_layers() > 0) {
    model["mixtures"] = c.num_moe_layers();
    model["experts"] = c.num_experts;
    model["experts_per_token"] = expert_use(c).per_token();
  }
  return model;
}

json teacher_of(const Session& s, const TrainState& state) {
  if (s.teacher == nullptr) return nullptr;
  const RunConfig::Train::Teacher& t = s.run.train.teacher;
  const ModelConfig& c = s.teacher->config();
  const ParamCounts counts = count_params(c);
  return {{"source", fs::absolute(t.model).lexically_normal().string()},
          {"digest", text_or_null(state.teacher_digest)},
          {"type", c.model_type},
          {"layers", c.num_hidden_layers},
          {"hidden_size", c.hidden_size},
          {"parameters", counts.total},
          {"activated", counts.activated},
          {"weight", t.weight},
          {"temperature", t.temperature}};
}

json file_of(const TokenFile& file) {
  return {{"path", fs::absolute(file.path()).lexically_normal().string()},
          {"tokens", file.num_tokens()},
          {"documents", file.document_ends().size()},
          {"tokenizer_sha256", text_or_null(file.tokenizer_sha256())},
          {"format", file.format()},
          {"identity", text_or_null(file.identity())}};
}

json data_of(const Session& s, const TrainState& state, std::span<const HeldOutData> held_out) {
  const std::vector<std::int64_t> sequences = s.data->sequences_of_source();
  json train = json::array(), valid = json::array();
  for (std::size_t i = 0; i < s.run.data.train.size(); ++i) {
    train.push_back(file_of(*s.data->files()[i]));
    train.back()["weight"] = s.run.data.train[i].weight;
    train.back()["sequences"] = sequences[i];
  }
  for (const HeldOutData& set : held_out) {
    valid.push_back(file_of(*set.data->files().front()));
    valid.back()["name"] = text_or_null(set.name);
    valid.back()["sequences"] = set.data->num_sequences();
  }
  return {{"train", train}, {"held_out", valid}, {"words", describe_data(s.run, sequences, state.step + 1)}};
}

}  // namespace

std::vector<std::string> command_of_this_process() {
  std::ifstream in("/proc/self/cmdline", std::ios::binary);
  std::vector<std::string> words;
  for (std::string word; std::getline(in, word, '\0');) words.push_back(word);
  return words;
}

std::string commit_of_this_program() {
  std::error_code unknown;
  const fs::path program = fs::read_symlink("/proc/self/exe", unknown);
  std::ifstream in(program.string() + ".commit");
  std::string line;
  std::getline(in, line);
  return line;
}

std::string start_record(const RunStart& start, const Session& s, const TrainState& state) {
  const RunOrigin& origin = start.origin;
  std::error_code gone;
  const json record{
      {"first_step", state.step + 1},
      {"started", now()},
      {"command", origin.command},
      {"folder", fs::current_path(gone).string()},
      {"program",
       {{"version", text_or_null(origin.version)},
        {"commit", text_or_null(origin.commit)},
        {"digest", text_or_null(start.digest)}}},
      {"machine", text_or_null(origin.machine)},
      {"hosts", origin.hosts},
      {"cores", text_or_null(start.cores)},
      {"ranks", s.mesh.world().size()},
      {"mesh", s.mesh.spec().str()},
      {"precision", name_of(s.run.train.precision)},
      {"model", model_of(s, state)},
      {"recipe", recipe_of(start.weights)},
      {"teacher", teacher_of(s, state)},
      {"frozen", text_or_null(describe_frozen(s.params))},
      {"kept_in_fp32", text_or_null(describe_fp32(s.params))},
      {"data", data_of(s, state, start.held_out)},
  };
  // Names of files are bytes.
  return record.dump(-1, ' ', false, json::error_handler_t::replace);
}

void write_start(const fs::path& run_dir, const std::string& record, bool goes_on) {
  const fs::path path = run_dir / "starts.jsonl";
  std::string earlier;
  if (goes_on) {
    std::ifstream in(path, std::ios::binary);
    earlier.assign(std::istreambuf_iterator<char>(in), {});
  }
  replace_text(path, earlier + record + "\n");
}

}  // namespace upmoe
