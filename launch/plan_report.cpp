#include "launch/plan_report.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "launch/text_table.h"

namespace upmoe {

namespace {

using nlohmann::json;
using Align = TextTable::Align;

constexpr double kGiB = 1024.0 * 1024.0 * 1024.0;

// TFLOP/s of a GPU that others print for bf16 training of a mixture of this grain, Qwen3-30B-A3B, on H100.
struct Published {
  const char* who;
  double tflops;
  const char* where;
  // Of a GPU, at that rate.
  double tokens_per_s_of(const RunPlan& plan) const {
    return tflops * 1e12 / (plan.model_flops / plan.tokens);
  }
};
constexpr Published kPublished[] = {
    {"NeMo AutoModel", 277, "its performance summary: Qwen3-30B-A3B, 8 H100, ep 8"},
    {"Megatron-Bridge", 299, "its performance summary: Qwen3-30B-A3B, 16 H100, ep 16, exchange overlapped"}};

std::string gib(double bytes) {
  return fmt::format("{:.2f}", bytes / kGiB);
}
std::string giga(double value) {
  return fmt::format("{:.3f}", value * 1e-9);
}
std::string milliseconds(double seconds) {
  return fmt::format("{:.2f}", seconds * 1e3);
}

// Few runs have a teacher.
std::vector<std::pair<const char*, double>> purposes(const MemoryPurposes& m) {
  std::vector<std::pair<const char*, double>> all;
  for (const auto& [name, bytes] : MemoryPurposes::kAll)
    if (bytes != &MemoryPurposes::teacher || m.teacher > 0) all.emplace_back(name, m.*bytes);
  return all;
}

std::string memory_table(const RunPlan& plan) {
  const PlannedRank& worst = plan.fullest();
  const MemoryPurposes mean = plan.mean_memory();
  TextTable table({{"GiB", Align::kLeft}, {fmt::format("rank {}, the fullest", worst.rank)}, {"mean"}});
  const auto of_worst = purposes(worst.memory), of_mean = purposes(mean);
  for (std::size_t i = 0; i < of_worst.size(); ++i)
    table.row({of_worst[i].first, gib(of_worst[i].second), gib(of_mean[i].second)});
  table.row({plan.on_host ? "together" : "together, without checkpoint", gib(plan.bytes_of(worst)),
             gib(mean.total(plan.on_host))});
  std::string text = table.str();
  if (plan.device_bytes > 0)
    text += fmt::format("of {} GiB: it {}\n", gib(plan.device_bytes), plan.fits() ? "fits" : "does not fit");
  return text;
}

std::string ranks_table(const RunPlan& plan) {
  TextTable table(
      {{"rehearsed rank"}, {"ranks like it"}, {"stage"}, {"experts of a layer"}, {"GiB"}, {"s of a step"}});
  for (const PlannedRank& r : plan.ranks)
    table.row({fmt::format("{}", r.rank), fmt::format("{}", r.alike), fmt::format("{}", r.stage),
               fmt::format("{}", r.experts), gib(plan.bytes_of(r)),
               plan.time ? fmt::format("{:.4f}", r.step.seconds()) : "-"});
  return table.str();
}

std::string ops_table(const PlannedRank& rank) {
  const bool taught = std::any_of(rank.costs.begin(), rank.costs.end(),
                                  [](const auto& entry) { return entry.second.teacher_flops > 0; });
  std::vector<TextTable::Column> columns{
      {fmt::format("op, rank {}", rank.rank), Align::kLeft}, {"calls"}, {"GFLOP"}, {"again"}};
  if (taught) columns.push_back({"the teacher's"});
  for (const char* head : {"GB read, written", "ms"}) columns.push_back({head});
  TextTable table(std::move(columns));
  for (const auto& [op, c] : rank.costs) {
    if (c.bytes_sent > 0 || rank.step.sent.contains(op)) continue;
    const auto ms = rank.step.by_op.find(op);
    std::vector<std::string> cells{op, fmt::format("{}", c.calls), giga(c.flops), giga(c.model_again)};
    if (taught) cells.push_back(giga(c.teacher_flops));
    cells.push_back(giga(c.bytes_read + c.bytes_written));
    cells.push_back(ms == rank.step.by_op.end() ? "-" : milliseconds(ms->second));
    table.row(std::move(cells));
  }
  return table.str();
}

std::string verbs_table(const PlannedRank& rank) {
  if (rank.step.sent.empty()) return "";
  TextTable table({{fmt::format("verb, rank {}", rank.rank), Align::kLeft},
                   {"times"},
                   {"GB inside the node"},
                   {"GB between nodes"},
                   {"ms waited"}});
  for (const auto& [verb, sent] : rank.step.sent) {
    const auto waited = rank.step.waited.find(verb);
    table.row({verb, fmt::format("{:.0f}", sent.transfers), giga(sent.inside), giga(sent.between),
               waited == rank.step.waited.end() ? "-" : milliseconds(waited->second)});
  }
  return fmt::format("\n{}", table.str());
}

std::string time_text(const PlanRequest& request, const RunPlan& plan) {
  const PlannedTime& t = *plan.time;
  TextTable table({{"ms of a step", Align::kLeft}, {""}});
  table.row({"all", milliseconds(t.seconds)});
  table.row({"computing", milliseconds(t.compute)});
  table.row({"of it beside the work, by call", milliseconds(t.calls)});
  table.row({"exchange of expert rows", milliseconds(t.exchange)});
  table.row({"sums and copies between ranks", milliseconds(t.reduction)});
  table.row({"between stages", milliseconds(t.stages)});
  table.row({"pipeline's bubble", milliseconds(t.bubble)});
  table.row({"of all, waiting for the slowest rank (mean)", milliseconds(t.imbalance)});
  std::string text = fmt::format(
      "{}\n{:.0f} tokens/s, {:.0f} of each rank; {:.1f} TFLOP/s of each rank, {:.1f} % of the peak; limited "
      "by {}\n",
      table.str(), t.tokens_per_s, t.tokens_per_s / plan.world, t.model_flops_per_s * 1e-12, 100 * t.mfu,
      t.limit());
  if (request.beside_published)
    for (const Published& p : kPublished)
      text += fmt::format("{} prints {:.0f} TFLOP/s, which here were {:.0f} tokens/s of each rank ({})\n",
                          p.who, p.tflops, p.tokens_per_s_of(plan), p.where);
  return text;
}

std::string changes_text(const RunPlan& plan, const std::vector<Change>& changes) {
  if (changes.empty())
    return plan.fits() ? "\nno single key that was tried makes it faster and still fit\n"
                       : "\nno single key that was tried makes it smaller: use more ranks, or --search\n";
  std::string text = plan.fits() ? "\nfaster:\n" : "\nsmaller:\n";
  for (const Change& c : changes)
    text += fmt::format("  {}: {} GiB, {:.2f} ms{}{}\n", c.keys, gib(c.bytes), c.seconds * 1e3,
                        c.fits ? "" : ", which does not fit yet",
                        c.ranks_without_experts > plan.ranks_without_experts
                            ? fmt::format("; {} of ep's ranks then hold no experts", c.ranks_without_experts)
                            : "");
  return text;
}

json memory_json(const MemoryPurposes& m, bool on_host) {
  json j;
  for (const auto& [name, bytes] : purposes(m)) j[name] = bytes;
  j["total"] = m.total(on_host);
  return j;
}

json rank_json(const PlannedRank& r, const RunPlan& plan) {
  json j{{"rank", r.rank},
         {"alike", r.alike},
         {"stage", r.stage},
         {"experts", r.experts},
         {"memory", memory_json(r.memory, plan.on_host)}};
  j["ops"] = json::object();
  j["verbs"] = json::object();
  for (const auto& [op, c] : r.costs) {
    if (c.bytes_sent > 0 || r.step.sent.contains(op)) continue;
    const auto seconds = r.step.by_op.find(op);
    j["ops"][op] = {{"calls", c.calls},
                    {"flops", c.flops},
                    {"model_flops", c.model_flops},
                    {"flops_again", c.model_again},
                    {"flops_teacher", c.teacher_flops},
                    {"bytes", c.bytes_read + c.bytes_written},
                    {"seconds", seconds == r.step.by_op.end() ? json() : json(seconds->second)}};
  }
  for (const auto& [verb, sent] : r.step.sent) {
    const auto waited = r.step.waited.find(verb);
    j["verbs"][verb] = {{"transfers", sent.transfers},
                        {"bytes_inside_node", sent.inside},
                        {"bytes_between_nodes", sent.between},
                        {"seconds_waited", waited == r.step.waited.end() ? 0.0 : waited->second}};
  }
  j["seconds"] = plan.time ? json(r.step.seconds()) : json();
  return j;
}

json parallel_json(const MeshSpec& m) {
  return {{"pp", m.pp}, {"dp", m.dp}, {"cp", m.cp}, {"tp", m.tp}, {"ep", m.ep}, {"etp", m.etp}};
}

json time_json(const PlannedTime& t, int world) {
  return {{"seconds", t.seconds},
          {"compute", t.compute},
          {"calls", t.calls},
          {"exchange", t.exchange},
          {"reduction", t.reduction},
          {"stages", t.stages},
          {"bubble", t.bubble},
          {"imbalance", t.imbalance},
          {"tokens_per_s", t.tokens_per_s},
          {"tokens_per_s_per_rank", t.tokens_per_s / world},
          {"flops_per_s_per_rank", t.model_flops_per_s},
          {"mfu", t.mfu},
          {"limit", t.limit()}};
}

json published_json(const RunPlan& plan) {
  json all = json::array();
  for (const Published& p : kPublished)
    all.push_back({{"who", p.who},
                   {"tflops_per_gpu", p.tflops},
                   {"source", p.where},
                   {"tokens_per_s_per_gpu", p.tokens_per_s_of(plan)}});
  return all;
}

json layout_json(const FoundLayout& f, int dp) {
  const RunConfig::Parallel& p = f.parallel;
  json j = parallel_json({.pp = p.pp, .dp = dp, .cp = p.cp, .tp = p.tp, .ep = p.ep, .etp = p.etp});
  j.update({{"ranks_without_experts", f.ranks_without_experts},
            {"pp_chunks", p.pp_chunks},
            {"node_ranks", p.node_ranks},
            {"zero", p.zero},
            {"micro_batch", f.micro_batch},
            {"recompute", name_of(f.recompute)},
            {"seconds", f.seconds},
            {"tokens_per_s", f.tokens_per_s},
            {"mfu", f.mfu},
            {"bytes", f.bytes}});
  return j;
}

// Where there is nothing to show: what to do.
std::string advice_of(const LayoutSearch& search) {
  if (search.plans == 0)
    return "no layout was planned, for the reasons below: name another --world, or see without --search what "
           "forbids the run's own mesh and which ones near it are possible";
  std::vector<std::string> less = search.savings;
  less.emplace_back("a smaller data.seq_len");
  return fmt::format(
      "no layout fits: the smallest that was planned takes {} GiB of {}. Start more ranks (--world), name a "
      "machine with more memory, or take less of it: {}",
      gib(search.least_bytes), gib(search.device_bytes), fmt::join(less, ", "));
}

}  // namespace

PlanReport plan_report(const PlanRequest& request, const RunPlan& plan, const std::vector<Change>& changes) {
  const PlannedRank& slowest = plan.slowest();
  std::string text = fmt::format("{} on {} rank{}{}: {}; {} micro-batch{} a rank, {:.0f} tokens a step\n\n",
                                 request.run, plan.world, plan.world == 1 ? "" : "s",
                                 request.machine.empty() ? "" : " of " + request.machine, plan.mesh.str(),
                                 plan.rounds, plan.rounds == 1 ? "" : "es", plan.tokens);
  for (const std::string& note : request.notes) text += note + "\n\n";
  text +=
      memory_table(plan) + "\n" + ranks_table(plan) + "\n" + ops_table(slowest) + verbs_table(slowest) + "\n";
  if (plan.teacher_flops > 0)
    text += fmt::format("of a step {} GFLOP of the model and, beside them, {} of its teacher's forward\n\n",
                        giga(plan.model_flops), giga(plan.teacher_flops));
  if (plan.time) {
    text += time_text(request, plan) + changes_text(plan, changes);
  } else {
    text += "times need a machine: --machine FILE, or a name of configs/machines\n";
  }
  json j{{"run", request.run},
         {"world", plan.world},
         {"machine", request.machine},
         {"parallel", parallel_json(plan.mesh)},
         {"ranks_without_experts", plan.ranks_without_experts},
         {"micro_batches_per_rank", plan.rounds},
         {"tokens_per_step", plan.tokens},
         {"model_flops_per_step", plan.model_flops},
         {"teacher_flops_per_step", plan.teacher_flops},
         {"fullest_rank", plan.fullest().rank},
         {"memory_fullest", memory_json(plan.fullest().memory, plan.on_host)},
         {"memory_mean", memory_json(plan.mean_memory(), plan.on_host)},
         {"device_bytes", plan.device_bytes},
         {"fits", plan.fits()}};
  j["ranks"] = json::array();
  for (const PlannedRank& r : plan.ranks) j["ranks"].push_back(rank_json(r, plan));
  j["time"] = plan.time ? time_json(*plan.time, plan.world) : json();
  j["published"] = request.beside_published ? published_json(plan) : json::array();
  j["changes"] = json::array();
  for (const Change& c : changes)
    j["changes"].push_back({{"keys", c.keys},
                            {"bytes", c.bytes},
                            {"seconds", c.seconds},
                            {"fits", c.fits},
                            {"ranks_without_experts", c.ranks_without_experts}});
  return {text, j.dump(2) + "\n"};
}

PlanReport search_report(const PlanRequest& request, int world, const LayoutSearch& search) {
  TextTable table({{"tp"},
                   {"pp"},
                   {"cp"},
                   {"ep"},
                   {"etp"},
                   {"dp"},
                   {"zero"},
                   {"micro_batch"},
                   {"recompute", Align::kLeft},
                   {"ms of a step"},
                   {"tokens/s of each"},
                   {"MFU, %"},
                   {"GiB"}});
  json layouts = json::array();
  for (const FoundLayout& f : search.best) {
    const RunConfig::Parallel& p = f.parallel;
    const auto dp = static_cast<int>(p.replicas(world));
    const auto number = [](std::int64_t n) { return fmt::format("{}", n); };
    table.row({number(p.tp), number(p.pp), number(p.cp), number(p.ep), number(p.etp), number(dp),
               number(p.zero), number(f.micro_batch), name_of(f.recompute), milliseconds(f.seconds),
               fmt::format("{:.0f}", f.tokens_per_s / world), fmt::format("{:.1f}", 100 * f.mfu),
               gib(f.bytes)});
    layouts.push_back(layout_json(f, dp));
  }
  const LayoutSearch::Excluded& x = search.excluded;
  const std::pair<const char*, std::int64_t> reasons[] = {
      {"impossible for this run", x.impossible},
      {"tp would leave a node", x.across_nodes},
      {"cp for sequences too short for it", x.short_context},
      {"etp where ep could have whole experts", x.cut_experts},
      {"ep above the number of experts, which others need not", x.idle_ranks},
      {"do not fit, recomputing everything, with one sequence", x.too_large},
      {"fit, and are slower", x.slower},
      {"not planned: others as much cut up were", x.not_reached}};
  std::string text = fmt::format("{} on {} ranks of {}: {} meshes, {} layouts planned\n\n", request.run,
                                 world, request.machine, search.meshes, search.plans);
  const std::string advice = search.best.empty() ? advice_of(search) : "";
  text += search.best.empty() ? advice + "\n" : table.str();
  if (!search.best.empty() && search.best.front().ranks_without_experts > 0)
    text +=
        "\nonly meshes with ep above the number of experts fit: some of their ranks hold none, and wait\n";
  text += fmt::format(
      "\nwhatever the run says, zero is {}, pp_chunks {} and node_ranks {} in all of them; its other keys "
      "hold. A plan of\none of them, without --search, tells whether other pp_chunks or node_ranks are "
      "faster\n",
      fmt::join(LayoutSearch::kZero, " or "), LayoutSearch::kChunks, LayoutSearch::kNodeRanks);
  text += "\nmeshes left out:\n";
  json excluded = json::object();
  for (const auto& [why, count] : reasons) {
    text += fmt::format("  {:>6} {}\n", count, why);
    excluded[why] = count;
  }
  const json j{{"run", request.run},      {"world", world},        {"machine", request.machine},
               {"meshes", search.meshes}, {"plans", search.plans}, {"layouts", layouts},
               {"excluded", excluded},    {"advice", advice}};
  return {text, j.dump(2) + "\n"};
}

}  // namespace upmoe
