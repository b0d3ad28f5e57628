#include "launch/cost_report.h"

#include <nlohmann/json.hpp>

#include "launch/text_table.h"

namespace upmoe {

namespace {

using nlohmann::json;
using Align = TextTable::Align;

CostReport finish(std::string text, const json& j) {
  return {std::move(text), j.dump(2) + "\n"};
}

std::string billions(std::int64_t n) {
  return fmt::format("{:.4f}", static_cast<double>(n) * 1e-9);
}
std::string giga(double x, int decimals = 2) {
  return fmt::format("{:.{}f}", x * 1e-9, decimals);
}
std::string percent(double share) {
  return fmt::format("{:.1f} %", 100 * share);
}
std::string scientific(double x) {
  return fmt::format("{:.3e}", x);
}

json bytes_json(const MemoryUse& use) {
  return {{"weights", use.parameters}, {"gradients", use.gradients}, {"optimizer", use.optimizer}};
}

json cost_json(const std::string& name, const ModelCost& c) {
  return {{"name", name},
          {"parameters", c.parameters.total},
          {"activated", c.parameters.activated},
          {"activated_non_embedding", c.parameters.activated_non_embedding},
          {"routed_parameters", c.routed},
          {"multiplied_weights", c.multiplied},
          {"expert_share", c.expert_share()},
          {"sparsity", c.sparsity()},
          {"seq_len", c.seq_len},
          {"forward_flops_per_token", c.forward_flops},
          {"attention_flops_per_token", c.attention_flops},
          {"train_flops_per_token", c.train_flops},
          {"again_flops_per_token", c.again_flops},
          {"weight_bytes", {{"bf16", c.weight_bytes(2)}, {"fp32", c.weight_bytes(4)}}},
          {"train_bytes", {{"adamw", bytes_json(c.adamw)}, {"adamw8bit", bytes_json(c.adamw8bit)}}},
          {"kv_bytes_per_token", c.kv_bytes}};
}

std::string parameters_table(const std::vector<NamedCost>& models) {
  TextTable table({{"10^9 parameters", Align::kLeft},
                   {"total"},
                   {"activated"},
                   {"without embedding"},
                   {"multiplied"},
                   {"in routed experts"},
                   {"left out"}});
  for (const auto& [name, c] : models)
    table.row({name, billions(c.parameters.total), billions(c.parameters.activated),
               billions(c.parameters.activated_non_embedding), billions(c.multiplied),
               percent(c.expert_share()), percent(c.sparsity())});
  return table.str();
}

std::string flops_table(const std::vector<NamedCost>& models, Recompute recompute) {
  TextTable table({{fmt::format("10^9 FLOP per token, {} tokens", models.front().cost.seq_len), Align::kLeft},
                   {"forward"},
                   {"of it attention"},
                   {"training"},
                   {fmt::format("again ({})", name_of(recompute))}});
  for (const auto& [name, c] : models)
    table.row(
        {name, giga(c.forward_flops), giga(c.attention_flops), giga(c.train_flops), giga(c.again_flops)});
  return table.str();
}

std::string bytes_table(const std::vector<NamedCost>& models) {
  const auto state = [](const MemoryUse& use) { return giga(static_cast<double>(use.total()), 1); };
  TextTable table({{"10^9 bytes", Align::kLeft},
                   {"weights, bf16"},
                   {"training, adamw"},
                   {"training, adamw8bit"},
                   {"cache, bytes per token"}});
  for (const auto& [name, c] : models)
    table.row({name, giga(static_cast<double>(c.weight_bytes(2)), 1), state(c.adamw), state(c.adamw8bit),
               fmt::format("{}", c.kv_bytes)});
  return table.str();
}

std::string training_table(const std::vector<NamedCost>& models, const TrainingLength& t) {
  std::vector<TextTable::Column> columns{{fmt::format("{:.4g} tokens", *t.tokens), Align::kLeft}, {"FLOP"}};
  if (t.machine)
    columns.push_back({fmt::format("hours of one {}, {:.0f} % of its peak", t.machine->name, 100 * t.mfu)});
  TextTable table(columns);
  for (const auto& [name, c] : models) {
    const double flops = c.train_flops * *t.tokens;
    std::vector<std::string> cells{name, scientific(flops)};
    if (t.machine)
      cells.push_back(fmt::format("{:.0f}", device_hours(flops, t.machine->peak_flops_per_s(), t.mfu)));
    table.row(cells);
  }
  return table.str();
}

constexpr const char* kDefinitions =
    "\nactivated: top-k of the routed experts, the shared one, routers and the rest; embedding and head once "
    "each,\n"
    "together once when tied. multiplied: weights that a token is multiplied by, without norms, biases and "
    "the rows of\n"
    "the embedding. forward: 2 * multiplied + attention over (s + 1) / 2 tokens in the mean; training: three "
    "times that.\n"
    "training bytes: weights, gradients in bf16 and what the optimizer keeps; activations are not in it.\n";

}  // namespace

CostReport models_report(const std::vector<NamedCost>& models, Recompute recompute,
                         const TrainingLength& training) {
  json all = json::array();
  for (const auto& [name, c] : models) {
    json j = cost_json(name, c);
    j["recompute"] = name_of(recompute);
    if (training.tokens) {
      j["tokens"] = *training.tokens;
      j["train_flops"] = c.train_flops * *training.tokens;
    }
    if (training.machine) {
      j["machine"] = training.machine->name;
      j["mfu"] = training.mfu;
      j["device_hours"] = device_hours(c.train_flops * training.tokens.value_or(0),
                                       training.machine->peak_flops_per_s(), training.mfu);
    }
    all.push_back(std::move(j));
  }
  std::string text =
      parameters_table(models) + "\n" + flops_table(models, recompute) + "\n" + bytes_table(models);
  if (training.tokens) text.append("\n").append(training_table(models, training));
  return finish(text + kDefinitions, all);
}

CostReport published_report(const std::vector<PublishedRow>& rows) {
  json all = json::array();
  std::string text;
  for (const bool announced : {true, false}) {
    TextTable table({{announced ? "the announcement's" : "others", Align::kLeft},
                     {"total"},
                     {"activated"},
                     {"non-emb."},
                     {"GFLOP/token"},
                     {"printed", Align::kLeft},
                     {"", Align::kLeft}});
    for (const auto& [published, c] : rows) {
      if (published->announced != announced) continue;
      const PublishedCells& cells = published->cells;
      const auto cell = [](const char* printed) { return *printed == 0 ? "-" : printed; };
      const std::string words = remark(*published, c.parameters);
      table.row({published->label, billions(c.parameters.total), billions(c.parameters.activated),
                 billions(c.parameters.activated_non_embedding), giga(c.train_flops),
                 fmt::format("{} {} {}", cell(cells.total), cell(cells.activated),
                             cell(cells.activated_non_embedding)),
                 words});
      json j = cost_json(published->file, c);
      j["published"] = {{"total", cells.total},
                        {"activated", cells.activated},
                        {"activated_non_embedding", cells.activated_non_embedding}};
      j["announced"] = announced;
      j["remark"] = words;
      all.push_back(std::move(j));
    }
    text += table.str() + "\n";
  }
  text += fmt::format(
      "10^9 parameters, computed and as printed; training FLOPs of a token at {} tokens. total, activated "
      "and activated\n"
      "without embedding and head; `upmoe cost MODEL` says what each counts.\n",
      rows.empty() ? 0 : rows.front().cost.seq_len);
  return finish(std::move(text), all);
}

namespace {

json reading_json(const ClaimReading& r) {
  json j{{"reading", r.reading}, {"formula", r.formula}, {"result", r.result}};
  if (r.seq_len > 0) j["seq_len"] = r.seq_len;
  if (r.saving) j["saving"] = *r.saving;
  if (r.tokens) j["tokens"] = *r.tokens;
  return j;
}

json measured_json(const MeasuredReading& m, const MeasuredClaim& claim) {
  json j = reading_json(m.reading);
  json& measured = j["measured"];
  measured = {{"mixture", claim.mixture}, {"dense", claim.dense},         {"loss", claim.loss},
              {"quantity", m.quantity},   {"with_source", m.with_source}, {"reached", m.share.has_value()},
              {"at_most", m.at_most}};
  if (m.with_source) measured["source"] = claim.source;
  if (m.share) measured["share"] = *m.share;
  return j;
}

// Whose runs were never published, and what ours say.
std::string words_of(const std::optional<MeasuredClaim>& measured) {
  if (!measured)
    return "\nHow many tokens the two models saw, and in how many hours, was never published. What one has "
           "to spend\nto reach the loss of the other is measured: upmoe cost --claim --run MIXTURE DENSE "
           "[--source RUN].\n\n";
  return fmt::format(
      "\nHow many tokens the two models saw, and in how many hours, was never published. Measured is what {} "
      "({})\nhad spent when it first came to the final loss of {} ({}){}.\nFLOPs are the model's{} on "
      "all ranks, without what is computed twice; seconds are of steps alone.\n\n",
      measured->mixture, measured->losses.front(), measured->dense, measured->losses.back(),
      measured->source.empty()
          ? ";\n--source RUN charges the run that made its source as well"
          : fmt::format(",\nwithout and with what {}, its source, had cost", measured->source),
      measured->taught ? " and those of a teacher's forward" : "");
}

}  // namespace

CostReport claim_report(const std::vector<ClaimReading>& readings,
                        const std::optional<MeasuredClaim>& measured, const std::vector<ClaimReading>& card) {
  json all = json::array();
  TextTable table({{"reading", Align::kLeft}, {"at"}, {"formula", Align::kLeft}, {"result", Align::kLeft}});
  const auto row = [&](const ClaimReading& r) {
    table.row({r.reading, r.seq_len > 0 ? fmt::format("{}", r.seq_len) : "", r.formula, r.result});
  };
  for (const ClaimReading& r : readings) {
    row(r);
    all.push_back(reading_json(r));
  }
  if (measured) {
    for (const MeasuredReading& m : measured->readings) {
      row(m.reading);
      all.push_back(measured_json(m, *measured));
    }
  }
  TextTable other(
      {{"Marco-Nano's card, 6 N tokens", Align::kLeft}, {"formula", Align::kLeft}, {"result", Align::kLeft}});
  for (const ClaimReading& r : card) {
    other.row({r.reading, r.formula, r.result});
    all.push_back(
        {{"of", "marco-nano"}, {"reading", r.reading}, {"formula", r.formula}, {"result", r.result}});
  }
  return finish(
      "What may have been meant by 75 % less training cost than Qwen1.5-7B, and what each reading "
      "gives:\n\n" +
          table.str() + words_of(measured) +
          "Another upcycled model's printed FLOPs. Its own tokens alone do not come near them; with those of "
          "its source\nthey do. That the card charges the source is inferred from this, it does not say "
          "so:\n\n" +
          other.str(),
      all);
}

}  // namespace upmoe
