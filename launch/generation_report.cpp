#include "launch/generation_report.h"

#include <fmt/ranges.h>

#include <nlohmann/json.hpp>
#include <set>

#include "launch/text_table.h"

namespace upmoe {

namespace {

using nlohmann::json;
using Align = TextTable::Align;

double per_second(double what, double seconds) {
  return seconds > 0 ? what / seconds : 0;
}

// One model at one concurrency, in what people ask for.
struct Speeds {
  double prefill, decode, requests;  // tokens/s, tokens/s, requests/s
  Speeds(const GenerationRates& r, const RatesRequest& request) {
    const auto n = static_cast<double>(r.concurrency);
    prefill = per_second(n * static_cast<double>(request.prompt), r.prefill_seconds);
    decode = per_second(n * static_cast<double>(request.output - 1), r.decode_seconds);
    requests = per_second(n, r.prefill_seconds + r.decode_seconds);
  }
};

// The same at best, as `upmoe cost --inference` has it, and which share of that was reached.
struct AtBest {
  double prefill_seconds, decode_seconds;  // of all prompts; of a step
  double prefill_share, decode_share;
  AtBest(const ServedModel& served, const Machine& machine, const GenerationRates& r,
         const RatesRequest& request) {
    const auto n = static_cast<double>(r.concurrency);
    prefill_seconds = upmoe::prefill_seconds(served, machine, n);
    decode_seconds =
        upmoe::decode_seconds(served, machine, n, served.mean_context(static_cast<double>(request.output)));
    prefill_share = per_second(prefill_seconds, r.prefill_seconds);
    decode_share = per_second(decode_seconds, r.step_seconds);
  }
};

double key_bytes_per_row(const GenerationMemory& m) {
  return m.rows > 0 ? static_cast<double>(m.keys) / static_cast<double>(m.rows) : 0;
}

std::string milliseconds(double seconds) {
  return fmt::format("{:.4g}", 1e3 * seconds);
}

std::string percent(double share) {
  return fmt::format("{:.1f} %", 100 * share);
}

std::string megabytes(double bytes) {
  return fmt::format("{:.4g}", 1e-6 * bytes);
}

// Null: it was not timed with so many.
const GenerationRates* rates_at(const TimedModel& m, std::int64_t concurrency) {
  for (const GenerationRates& r : m.rates)
    if (r.concurrency == concurrency) return &r;
  return nullptr;
}

// Row by row: every concurrency, and at each every model that has it, beside the first one's rates or null.
template <class Row>
void each(const std::vector<TimedModel>& models, const Row& row) {
  std::set<std::int64_t> numbers;
  for (const TimedModel& m : models)
    for (const GenerationRates& r : m.rates) numbers.insert(r.concurrency);
  for (const std::int64_t n : numbers)
    for (const TimedModel& m : models)
      if (const GenerationRates* r = rates_at(m, n)) row(m, *r, rates_at(models.front(), n));
}

// How many times the first model's.
struct OfFirst {
  double prefill, decode, requests;
  OfFirst(const Speeds& s, const Speeds& first)
      : prefill(per_second(s.prefill, first.prefill)),
        decode(per_second(s.decode, first.decode)),
        requests(per_second(s.requests, first.requests)) {}
};

constexpr const char* kNotTimed = "-";

std::string rates_table(const std::vector<TimedModel>& models, const RatesRequest& request) {
  const bool compared = models.size() > 1;
  std::vector<TextTable::Column> columns{{"at once"}, {"model", Align::kLeft}};
  for (const char* head :
       {"prefill, tokens/s", "decode, tokens/s", "ms per token", "95 of 100 within", "requests/s"})
    columns.push_back({head});
  if (compared)
    for (const char* head : {"of the first: prefill", "decode", "requests/s"}) columns.push_back({head});
  TextTable table(columns);
  each(models, [&](const TimedModel& m, const GenerationRates& r, const GenerationRates* of_first) {
    const Speeds s(r, request);
    std::vector<std::string> cells{fmt::format("{}", r.concurrency), m.name,
                                   fmt::format("{:.4g}", s.prefill), fmt::format("{:.4g}", s.decode),
                                   milliseconds(r.step_seconds),     milliseconds(r.slow_step_seconds),
                                   fmt::format("{:.4g}", s.requests)};
    if (compared && of_first != nullptr) {
      const OfFirst ratio(s, Speeds(*of_first, request));
      for (const double part : {ratio.prefill, ratio.decode, ratio.requests})
        cells.push_back(fmt::format("{:.3f}", part));
    } else if (compared) {
      cells.insert(cells.end(), 3, kNotTimed);
    }
    table.row(cells);
  });
  return table.str();
}

std::string roofline_table(const std::vector<TimedModel>& models, const RatesRequest& request,
                           const Machine& machine) {
  TextTable table({{"at once"},
                   {"model", Align::kLeft},
                   {"prefill at best, ms"},
                   {"reached"},
                   {"decode at best, ms per token"},
                   {"reached"},
                   {"of the first at best: decode"}});
  each(models, [&](const TimedModel& m, const GenerationRates& r, const GenerationRates* of_first) {
    const AtBest best(*m.served, machine, r, request);
    std::string ratio = kNotTimed;
    if (of_first != nullptr) {
      const AtBest first(*models.front().served, machine, *of_first, request);
      ratio = fmt::format("{:.3f}", first.decode_seconds / best.decode_seconds);
    }
    table.row({fmt::format("{}", r.concurrency), m.name, milliseconds(best.prefill_seconds),
               percent(best.prefill_share), milliseconds(best.decode_seconds), percent(best.decode_share),
               ratio});
  });
  return table.str();
}

// Each model with as many requests as it has room for: what a device that is kept busy could.
std::string room_table(const std::vector<TimedModel>& models, const RatesRequest& request) {
  TextTable table({{"model", Align::kLeft}, {"at once"}, {"requests/s"}, {"of the first"}});
  for (const TimedModel& m : models) {
    const Speeds s(m.rates.back(), request), first(models.front().rates.back(), request);
    table.row(
        {m.name,
         fmt::format("{}{}", m.rates.back().concurrency, m.room->more_fit ? ", and more would fit" : ""),
         fmt::format("{:.4g}", s.requests), fmt::format("{:.3f}", OfFirst(s, first).requests)});
  }
  return table.str();
}

std::string memory_table(const std::vector<TimedModel>& models) {
  TextTable table({{"at once"},
                   {"10^6 bytes", Align::kLeft},
                   {"weights"},
                   {"keys and values of a request"},
                   {"activations and temporary"}});
  each(models, [&](const TimedModel& m, const GenerationRates& r, const GenerationRates*) {
    table.row({fmt::format("{}", r.concurrency), m.name, megabytes(static_cast<double>(r.memory.weights)),
               megabytes(key_bytes_per_row(r.memory)), megabytes(static_cast<double>(r.memory.work))});
  });
  return table.str();
}

std::string text_of(const std::vector<TimedModel>& models, const RatesRequest& request, const TimedOn& on) {
  std::string text =
      fmt::format("{}, {}{}: requests of {} tokens in and {} out; medians of {} round{}{}.\n\n{}", on.device,
                  on.precision, on.ranks > 1 ? fmt::format(", {} ranks", on.ranks) : "", request.prompt,
                  request.output, request.rounds, request.rounds == 1 ? "" : "s",
                  models.size() > 1 ? ", the models in turns" : "", rates_table(models, request));
  std::vector<std::string> random;
  for (const TimedModel& m : models)
    if (m.random_weights) random.push_back(m.name);
  if (!random.empty())
    text += fmt::format("\nRandom weights, by a configuration alone: {}.\n", fmt::join(random, ", "));
  text +=
      "\nPrompts go through a model one by one, then all answers step together; requests/s is that of one "
      "such batch.\n\n";
  if (models.front().room)
    text += fmt::format("As many at once as fit into {:.0f} % of {:.4g} GB{}, beside {}:\n\n{}\n",
                        100 * kMemoryOfRows, on.rank_bytes * 1e-9, on.ranks > 1 ? " of each rank" : "",
                        models.size() > 1 ? "the weights of all models" : "the weights",
                        room_table(models, request));
  if (on.machine)
    text += fmt::format(
        "What memory and products of a data sheet need at least ({}, as upmoe cost --inference):\n\n{}\n",
        on.machine->name, roofline_table(models, request, *on.machine));
  return text +
         fmt::format("Memory{}:\n\n{}", on.ranks > 1 ? " of the first rank" : "", memory_table(models));
}

json of_first_json(const Speeds& s, const GenerationRates* first, const RatesRequest& request) {
  if (first == nullptr) return nullptr;
  const OfFirst ratio(s, Speeds(*first, request));
  return {{"prefill", ratio.prefill}, {"decode", ratio.decode}, {"requests", ratio.requests}};
}

json room_json(const TimedModel& m, const TimedModel& compared, const RatesRequest& request) {
  if (!m.room) return nullptr;
  return {{"concurrency", m.room->requests},
          {"more_fit", m.room->more_fit},
          {"of_first", of_first_json(Speeds(m.rates.back(), request), &compared.rates.back(), request)}};
}

json rates_json(const TimedModel& m, const GenerationRates& r, const TimedModel& compared,
                const RatesRequest& request, const TimedOn& on) {
  const Speeds s(r, request);
  json j{{"concurrency", r.concurrency},
         {"prefill_seconds", r.prefill_seconds},
         {"decode_seconds", r.decode_seconds},
         {"prefill_tokens_per_s", s.prefill},
         {"decode_tokens_per_s", s.decode},
         {"seconds_per_token", r.step_seconds},
         {"seconds_per_token_95", r.slow_step_seconds},
         {"requests_per_s", s.requests},
         {"weight_bytes", r.memory.weights},
         {"key_bytes_per_request", key_bytes_per_row(r.memory)},
         {"work_bytes", r.memory.work},
         {"of_first", of_first_json(s, rates_at(compared, r.concurrency), request)}};
  if (on.machine) {
    const AtBest best(*m.served, *on.machine, r, request);
    j["at_best"] = {{"prefill_seconds", best.prefill_seconds},
                    {"decode_seconds", best.decode_seconds},
                    {"prefill_share", best.prefill_share},
                    {"decode_share", best.decode_share}};
  }
  return j;
}

json json_of(const std::vector<TimedModel>& models, const RatesRequest& request, const TimedOn& on) {
  json j{{"device", on.device},      {"precision", on.precision}, {"ranks", on.ranks},
         {"prompt", request.prompt}, {"output", request.output},  {"rounds", request.rounds},
         {"machine", nullptr},       {"rank_bytes", nullptr},     {"models", json::array()}};
  if (on.machine) j["machine"] = on.machine->name;
  if (on.rank_bytes > 0) j["rank_bytes"] = on.rank_bytes;
  for (const TimedModel& m : models) {
    json one{{"name", m.name},
             {"random_weights", m.random_weights},
             {"rates", json::array()},
             {"room", room_json(m, models.front(), request)}};
    for (const GenerationRates& r : m.rates)
      one["rates"].push_back(rates_json(m, r, models.front(), request, on));
    j["models"].push_back(std::move(one));
  }
  return j;
}

}  // namespace

GenerationReport generation_report(const std::vector<TimedModel>& models, const RatesRequest& request,
                                   const TimedOn& on) {
  UPMOE_CHECK(!models.empty(), "nothing was timed");
  return {text_of(models, request, on), json_of(models, request, on).dump(2) + "\n"};
}

}  // namespace upmoe
