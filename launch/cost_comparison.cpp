#include "launch/cost_comparison.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "kernels/core/check.h"
#include "launch/text_table.h"

namespace upmoe {

namespace {

using nlohmann::json;
using Align = TextTable::Align;

constexpr int kBatches[] = {1, 4, 16, 32, 64, 128, 256};
// Of a server that is kept busy: what it may fill of the memory, and reaches of the data sheet. Assumed.
constexpr double kMemoryShare = 0.9;
constexpr Attained kBusy{.bandwidth = 0.8, .products = 0.5};

std::string share(double part, double whole) {
  return fmt::format("{:.1f} %", 100 * part / whole);
}

json spent_json(const Spent& s) {
  return {{"tokens", s.tokens}, {"flops", s.flops}, {"seconds", s.seconds}};
}

// What `run` needed to come to the final loss of `other`, as a row and as JSON; with what `source` spent on top.
struct Reached {
  const RunCurve &run, &other;
  const RunCurve* source;

  // As `first` where all that is known is that it was no more: a source that is charged whole came by that loss, or the
  // run before its first point.
  std::optional<Arrival> arrival() const {
    std::optional<Arrival> s = spent_at(run, other.final_loss());
    if (s && source != nullptr) s->spent += source->spent;
    if (s && s->spent.tokens == 0) s->first = false;
    return s;
  }
  std::string name() const { return source == nullptr ? run.name : run.name + " and its source"; }
  std::vector<std::string> row() const {
    const std::string loss = fmt::format("{:.4f} of {}", other.final_loss(), other.name);
    const std::optional<Arrival> s = arrival();
    if (!s) return {name(), loss, "not reached", "", "", "", "", ""};
    const Spent &own = s->spent, &all = other.to_final_loss();
    const std::string most = s->first ? "at most " : "";
    return {name(),
            loss,
            most + fmt::format("{:.4g}", own.tokens),
            most + fmt::format("{:.4g}", own.flops),
            most + fmt::format("{:.1f}", own.seconds),
            most + share(own.tokens, all.tokens),
            most + share(own.flops, all.flops),
            most + share(own.seconds, all.seconds)};
  }
  json as_json() const {
    json j{{"loss", other.final_loss()},
           {"of", other.name},
           {"with_source", source != nullptr},
           {"reached", false}};
    if (const std::optional<Arrival> s = arrival()) {
      const Spent &own = s->spent, &all = other.to_final_loss();
      j["reached"] = true;
      j["at_most"] = s->first;
      j["spent"] = spent_json(own);
      j["share"] = {{"tokens", own.tokens / all.tokens},
                    {"flops", own.flops / all.flops},
                    {"seconds", own.seconds / all.seconds}};
    }
    return j;
  }
};

bool is_taught(const RunCurve& run) {
  return run.teacher_flops > 0;
}

std::string runs_table(const std::vector<RunCurve>& runs) {
  TextTable table(
      {{"run", Align::kLeft}, {"tokens"}, {"FLOP"}, {"seconds"}, {"final loss"}, {"which", Align::kLeft}});
  for (const RunCurve& r : runs)
    table.row({r.name, fmt::format("{:.4g}", r.spent.tokens), fmt::format("{:.4g}", r.spent.flops),
               fmt::format("{:.1f}", r.spent.seconds), fmt::format("{:.4f}", r.final_loss()),
               r.held_out ? "held-out" : "training, smoothed"});
  return table.str();
}

// 1 - a part of the dense run's tokens, FLOPs or seconds.
MeasuredReading measured_reading(const Reached& way, const char* quantity, double Spent::*of) {
  const double dense = way.other.to_final_loss().*of;
  MeasuredReading m;
  m.quantity = quantity;
  m.with_source = way.source != nullptr;
  ClaimReading& r = m.reading;
  r.reading = fmt::format("measured to a loss: {}, source {}", quantity,
                          m.with_source ? "charged" : "not charged (sunk)");
  const std::optional<Arrival> arrival = way.arrival();
  if (!arrival) {
    r.formula = fmt::format("loss {:.4f} of {}", way.other.final_loss(), way.other.name);
    r.result = fmt::format("not reached: {} ends at {:.4f}", way.run.name, way.run.final_loss());
    return m;
  }
  const double spent = arrival->spent.*of;
  m.share = spent / dense;
  m.at_most = arrival->first;
  r.saving = 1 - *m.share;
  r.formula = fmt::format("1 - {}{:.4g} / {:.4g} (loss {:.4f} of {})", m.at_most ? "at most " : "", spent,
                          dense, way.other.final_loss(), way.other.name);
  const std::string saved = *r.saving > 0 ? share(*r.saving, 1) + " saved" : "nothing saved";
  r.result = fmt::format("{}: {}{} of {}'s",
                         m.at_most ? "at least " + share(std::max(0.0, *r.saving), 1) + " saved" : saved,
                         m.at_most ? "at most " : "", share(*m.share, 1), way.other.name);
  return m;
}

struct Capacity {
  std::int64_t sequences;
  double requests_per_s;
};
Capacity capacity_of(const ServedModel& m, const Machine& machine, const Request& r, double context) {
  return {sequences_that_fit(m, machine, context, kMemoryShare),
          requests_per_s(m, machine, static_cast<double>(r.output), kMemoryShare, kBusy)};
}

}  // namespace

CostReport runs_report(const std::vector<RunCurve>& runs, const std::optional<RunCurve>& source) {
  json all = json::array();
  TextTable reached({{"run", Align::kLeft},
                     {"comes to the loss", Align::kLeft},
                     {"with tokens"},
                     {"FLOP"},
                     {"seconds"},
                     {"of its tokens"},
                     {"FLOP"},
                     {"seconds"}});
  for (const RunCurve& run : runs) {
    json j{{"name", run.name},
           {"spent", spent_json(run.spent)},
           {"final_loss", run.final_loss()},
           {"held_out", run.held_out}};
    j["reaches"] = json::array();
    for (const RunCurve& other : runs) {
      if (&other == &run) continue;
      std::vector<Reached> ways{{run, other, nullptr}};
      if (source && &run == &runs.front()) ways.push_back({run, other, &*source});
      for (const Reached& way : ways) {
        reached.row(way.row());
        j["reaches"].push_back(way.as_json());
      }
    }
    all.push_back(std::move(j));
  }
  std::string text = runs_table(runs);
  if (runs.size() > 1) text.append("\n").append(reached.str());
  const bool taught = (source && is_taught(*source)) || std::any_of(runs.begin(), runs.end(), is_taught);
  text += fmt::format(
      "\nFLOPs of the model{} on all ranks, without what is computed twice; seconds of steps alone.\n",
      taught ? " and of a teacher's forward" : "");
  return {text, all.dump(2) + "\n"};
}

MeasuredClaim measured_claim(const RunCurve& mixture, const RunCurve& dense,
                             const std::optional<RunCurve>& source) {
  if (dense.counts_experts)
    fail(ExitCode::kUsage,
         "upmoe cost: --claim: {} is the run of a mixture; expected --run MIXTURE DENSE, in this order",
         dense.name);
  MeasuredClaim claim{.mixture = mixture.name,
                      .dense = dense.name,
                      .source = source ? source->name : "",
                      .loss = dense.final_loss(),
                      .taught = is_taught(mixture) || is_taught(dense) || (source && is_taught(*source)),
                      .losses = {},
                      .readings = {}};
  for (const RunCurve* run : {&mixture, &dense})
    claim.losses.push_back(run->held_out ? "held-out" : "training, smoothed");
  std::vector<Reached> ways{{mixture, dense, nullptr}};
  if (source) ways.push_back({mixture, dense, &*source});
  for (const Reached& way : ways)
    for (const auto& [quantity, of] :
         {std::pair{"tokens", &Spent::tokens}, {"FLOPs", &Spent::flops}, {"seconds", &Spent::seconds}})
      claim.readings.push_back(measured_reading(way, quantity, of));
  return claim;
}

CostReport fit_report(const std::vector<RunOutcome>& runs, const ScalingFit& fit) {
  TextTable numbers({{"number", Align::kLeft}, {"fitted"}, {"with one run left out"}});
  json j{{"law", fit.law}, {"rms", fit.rms}, {"remarks", fit.remarks}};
  for (const FittedNumber& n : fit.numbers) {
    numbers.row(
        {n.name, fmt::format("{:.4g}", n.value),
         n.range ? fmt::format("{:.4g} to {:.4g}", n.range->first, n.range->second) : "too few runs"});
    j["numbers"][n.name] = {{"value", n.value}};
    if (n.range) j["numbers"][n.name]["range"] = {n.range->first, n.range->second};
  }
  const bool sources = runs.front().source_tokens.has_value();
  std::vector<TextTable::Column> columns{{"run", Align::kLeft}, {"N"}, {sources ? "D2" : "D"}};
  if (sources) columns.push_back({"D1"});
  for (const char* head : {"loss", "of the law", "residual"}) columns.push_back({head});
  TextTable residuals(columns);
  j["runs"] = json::array();
  for (std::size_t i = 0; i < runs.size(); ++i) {
    const RunOutcome& r = runs[i];
    const double residual = r.loss - fit.predicted[i];
    std::vector<std::string> cells{r.name, fmt::format("{:.4g}", r.size), fmt::format("{:.4g}", r.tokens)};
    if (r.source_tokens) cells.push_back(fmt::format("{:.4g}", *r.source_tokens));
    cells.insert(cells.end(), {fmt::format("{:.4f}", r.loss), fmt::format("{:.4f}", fit.predicted[i]),
                               fmt::format("{:+.4f}", residual)});
    residuals.row(cells);
    json row{{"name", r.name},
             {"size", r.size},
             {"tokens", r.tokens},
             {"loss", r.loss},
             {"predicted", fit.predicted[i]},
             {"residual", residual}};
    if (r.source_tokens) row["source_tokens"] = *r.source_tokens;
    j["runs"].push_back(std::move(row));
  }
  std::string text =
      fmt::format("{}, {} losses of {} runs:\n\n{}\n{}\nResiduals are {:.4f} nats in the root mean square.\n",
                  fit.law, runs.front().held_out ? "held-out" : "smoothed training", runs.size(),
                  numbers.str(), residuals.str(), fit.rms);
  for (const std::string& words : fit.remarks) text.append(words).append("\n");
  text +=
      "N: the model's FLOPs of training per token / 6, attention included. Each loss is that of a run's end: "
      "a run counts\nfor its own schedule, not for where it was on the way.\n";
  return {text, j.dump(2) + "\n"};
}

CostReport inference_report(const Served& first, const Served& second, const Machine& machine,
                            const Request& request) {
  const double context = first.model.mean_context(static_cast<double>(request.output));
  TextTable table({{"batch"},
                   {"decode, ms: " + first.name},
                   {second.name},
                   {"times as long"},
                   {"prefill, ms: " + first.name},
                   {second.name},
                   {"times as long"},
                   {"experts read"}});
  json batches = json::array();
  const auto ms = [](double seconds) { return fmt::format("{:.2f}", 1e3 * seconds); };
  for (const int batch : kBatches) {
    const double a = decode_seconds(first.model, machine, batch, context),
                 b = decode_seconds(second.model, machine, batch, context),
                 c = prefill_seconds(first.model, machine, batch),
                 d = prefill_seconds(second.model, machine, batch),
                 experts = expected_experts(first.model, batch);
    table.row({fmt::format("{}", batch), ms(a), ms(b), fmt::format("{:.2f}", b / a), ms(c), ms(d),
               fmt::format("{:.2f}", d / c),
               experts > 0 ? fmt::format("{:.1f} of {:.0f}", experts, first.model.experts) : "-"});
    batches.push_back({{"batch", batch},
                       {"decode_seconds", {a, b}},
                       {"decode_ratio", b / a},
                       {"prefill_seconds", {c, d}},
                       {"prefill_ratio", d / c},
                       {"experts_read", experts}});
  }
  const Capacity one = capacity_of(first.model, machine, request, context),
                 two = capacity_of(second.model, machine, request, context);
  TextTable full({{"as many as fit", Align::kLeft}, {"sequences"}, {"requests/s"}});
  full.row({first.name, fmt::format("{}", one.sequences), fmt::format("{:.2f}", one.requests_per_s)});
  full.row({second.name, fmt::format("{}", two.sequences), fmt::format("{:.2f}", two.requests_per_s)});
  const json j{{"models", {first.name, second.name}},
               {"machine", machine.name},
               {"prompt", request.prompt},
               {"output", request.output},
               {"batches", batches},
               {"sequences", {one.sequences, two.sequences}},
               {"requests_per_s", {one.requests_per_s, two.requests_per_s}}};
  return {fmt::format("One {}, bf16, {} tokens of context; the longer of what memory and products need, "
                      "nothing measured:\n\n{}\n"
                      "A server kept busy with requests of {} tokens in and {} out, in {:.0f} % of the "
                      "memory, at {:.0f} % of the bandwidth and\n"
                      "{:.0f} % of the products (assumed):\n\n{}",
                      machine.name, context, table.str(), request.prompt, request.output, 100 * kMemoryShare,
                      100 * kBusy.bandwidth, 100 * kBusy.products, full.str()),
          j.dump(2) + "\n"};
}

}  // namespace upmoe
