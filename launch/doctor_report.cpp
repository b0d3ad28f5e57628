#include "launch/doctor_report.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "launch/text_table.h"

namespace upmoe {

namespace {

using nlohmann::json;
using Align = TextTable::Align;

constexpr double kGB = 1e9, kMiB = 1024.0 * 1024.0;

const char* name_of(Severity severity) {
  switch (severity) {
    case Severity::kNote:
      return "note";
    case Severity::kWarning:
      return "warning";
    case Severity::kFailure:
      return "failure";
  }
  fail(ExitCode::kFailure, "no such severity");
}

std::string limit_words(std::uint64_t limit, double unit, const char* name) {
  return limit == kUnlimited ? "unlimited" : fmt::format("{:.0f}{}", static_cast<double>(limit) / unit, name);
}

json facts_json(const HostFacts& f) {
  json j{{"processor", f.processor},
         {"allowed", f.allowed},
         {"quota", f.quota},
         {"memory", f.memory},
         {"memory_left", f.memory_left},
         {"resident", f.resident},
         {"open_files", {f.open_files.soft, f.open_files.hard}},
         {"locked_memory", {f.locked_memory.soft, f.locked_memory.hard}},
         {"gpu_driver", f.gpu_driver},
         {"gpus", f.gpus},
         {"rdma_adapters", f.rdma_adapters}};
  if (f.shared_memory_left) j["shared_memory_left"] = *f.shared_memory_left;
  return j;
}

HostFacts facts_of(const json& j) {
  const auto limit = [&](const char* key) {
    return ResourceLimit{j.at(key).at(0).get<std::uint64_t>(), j.at(key).at(1).get<std::uint64_t>()};
  };
  HostFacts f;
  f.processor = j.at("processor");
  f.allowed = j.at("allowed");
  f.quota = j.at("quota");
  f.memory = j.at("memory");
  f.memory_left = j.at("memory_left");
  f.resident = j.at("resident");
  f.open_files = limit("open_files");
  f.locked_memory = limit("locked_memory");
  f.gpu_driver = j.at("gpu_driver");
  f.gpus = j.at("gpus");
  f.rdma_adapters = j.at("rdma_adapters");
  if (j.contains("shared_memory_left")) f.shared_memory_left = j.at("shared_memory_left").get<double>();
  return f;
}

json folder_json(const FolderFacts& f) {
  return {{"asked", f.asked.string()},
          {"existing", f.existing.string()},
          {"kind", f.kind},
          {"free_bytes", f.free_bytes}};
}

// One finding and the ranks that have it.
struct Told {
  const Finding* finding;
  std::vector<std::size_t> ranks;
};

std::vector<Told> told_once(const std::vector<RankDiagnosis>& by_rank) {
  std::vector<Told> all;
  for (std::size_t r = 0; r < by_rank.size(); ++r)
    for (const Finding& f : by_rank[r].findings) {
      const auto same = std::find_if(all.begin(), all.end(), [&](const Told& t) {
        return t.finding->words == f.words && t.finding->severity == f.severity;
      });
      if (same == all.end())
        all.push_back({&f, {r}});
      else
        same->ranks.push_back(r);
    }
  std::stable_sort(all.begin(), all.end(),
                   [](const Told& a, const Told& b) { return a.finding->severity > b.finding->severity; });
  return all;
}

std::string host_lines(const RankDiagnosis& d) {
  const HostFacts& f = d.facts;
  std::string out =
      fmt::format("\n{}: {}{}, {:.1f} of {:.1f} GB of memory left\n", d.host,
                  f.processor.empty() ? "a processor without a name" : f.processor,
                  f.quota > 0 ? fmt::format(" ({:g} of its cores granted to the container)", f.quota) : "",
                  f.memory_left / kGB, f.memory / kGB);
  out += fmt::format(
      "  open files {} (up to {}), locked memory {}, /dev/shm {}\n", limit_words(f.open_files.soft, 1, ""),
      limit_words(f.open_files.hard, 1, ""), limit_words(f.locked_memory.soft, kMiB, " MiB"),
      f.shared_memory_left ? fmt::format("{:.0f} MiB left", *f.shared_memory_left / kMiB) : "absent");
  if (!f.gpu_driver.empty()) out += fmt::format("  {} GPUs, NVIDIA driver {}\n", f.gpus, f.gpu_driver);
  if (!d.folder.asked.empty())
    out += fmt::format("  {}: {}, {:.1f} GB free{}\n", d.folder.asked.string(),
                       d.folder.kind.empty() ? "an unknown file system" : d.folder.kind,
                       d.folder.free_bytes / kGB, d.trial.empty() ? "" : "; " + d.trial);
  return out;
}

}  // namespace

std::string to_text(const RankDiagnosis& d) {
  json j{{"host", d.host},     {"device", d.device},           {"threads", d.threads},
         {"speaks", d.speaks}, {"facts", facts_json(d.facts)}, {"folder", folder_json(d.folder)},
         {"trial", d.trial}};
  j["findings"] = json::array();
  for (const Finding& f : d.findings)
    j["findings"].push_back({static_cast<int>(f.severity), static_cast<int>(f.code), f.words});
  return j.dump(-1, ' ', false, json::error_handler_t::replace);
}

RankDiagnosis diagnosis_of(const std::string& text) {
  const json j = json::parse(text);
  RankDiagnosis d;
  d.host = j.at("host");
  d.device = j.at("device");
  d.threads = j.at("threads");
  d.speaks = j.at("speaks");
  d.facts = facts_of(j.at("facts"));
  const json& folder = j.at("folder");
  d.folder = {.asked = folder.at("asked").get<std::string>(),
              .existing = folder.at("existing").get<std::string>(),
              .kind = folder.at("kind"),
              .free_bytes = folder.at("free_bytes")};
  d.trial = j.at("trial");
  for (const json& f : j.at("findings"))
    d.findings.push_back(
        {static_cast<Severity>(f.at(0).get<int>()), static_cast<ExitCode>(f.at(1).get<int>()), f.at(2)});
  return d;
}

DoctorReport doctor_report(const std::vector<RankDiagnosis>& by_rank,
                           const std::vector<std::pair<std::string, std::string>>& libraries) {
  TextTable ranks({{"rank"},
                   {"host", Align::kLeft},
                   {"computes on", Align::kLeft},
                   {"cores", Align::kLeft},
                   {"threads"}});
  json j{{"ranks", json::array()},
         {"hosts", json::array()},
         {"libraries", json::object()},
         {"findings", json::array()}};
  std::string hosts;
  for (std::size_t r = 0; r < by_rank.size(); ++r) {
    const RankDiagnosis& d = by_rank[r];
    ranks.row({fmt::format("{}", r), d.host, d.device, d.facts.allowed, fmt::format("{}", d.threads)});
    j["ranks"].push_back({{"rank", r},
                          {"host", d.host},
                          {"device", d.device},
                          {"cores", d.facts.allowed},
                          {"threads", d.threads}});
    if (!d.speaks) continue;
    hosts += host_lines(d);
    json host = facts_json(d.facts);
    host.erase("allowed");  // each rank's own, told with it
    host["host"] = d.host;
    host["folder"] = folder_json(d.folder);
    j["hosts"].push_back(std::move(host));
  }
  std::string versions;
  for (const auto& [name, version] : libraries) {
    versions += fmt::format("{}: {}\n", name, version);
    j["libraries"][name] = version;
  }
  DoctorReport report;
  std::string found;
  for (const Told& t : told_once(by_rank)) {
    const bool all = t.ranks.size() == by_rank.size();
    found += fmt::format("{}: {}{}\n", name_of(t.finding->severity), t.finding->words,
                         all ? "" : fmt::format(" [rank {}]", fmt::join(t.ranks, ", ")));
    j["findings"].push_back({{"severity", name_of(t.finding->severity)},
                             {"code", static_cast<int>(t.finding->code)},
                             {"words", t.finding->words},
                             {"ranks", t.ranks}});
    if (t.finding->severity == Severity::kFailure && report.code == ExitCode::kDone)
      report.code = t.finding->code;
  }
  if (found.empty()) found = "Nothing looks wrong.\n";
  if (report.code != ExitCode::kDone) found += "A run would not start here.\n";
  j["can_start"] = report.code == ExitCode::kDone;
  report.text = ranks.str() + hosts + "\n" + versions + "\n" + found;
  report.json = j.dump(2) + "\n";
  return report;
}

std::string transfers_table(const std::vector<TransferTime>& transfers) {
  TextTable table({{"link", Align::kLeft},
                   {"verb", Align::kLeft},
                   {"bytes"},
                   {"microseconds"},
                   {"GB/s that a rank sends"}});
  for (const TransferTime& t : transfers)
    table.row({t.link, t.verb, fmt::format("{}", t.bytes), fmt::format("{:.1f}", t.seconds * 1e6),
               fmt::format("{:.3f}", t.bytes_per_s / kGB)});
  return table.str();
}

}  // namespace upmoe
